"""Questions and answers about using llmrs: installation, commands, Python, tasks."""

from demo_model.dialogue import Topic

YAML_EXAMPLE = """model: demo
temperature: 0.6
max_tokens: 64
prompts: ["How are you?", "What is 7 + 5?"]"""

PYTHON_EXAMPLE = """from llmrs import Engine, EngineConfig, SamplingParams

with Engine(EngineConfig("demo")) as engine:
    params = SamplingParams(max_tokens=32)
    print(engine.generate_sync(params, ["llmrs is"])[0].text)"""

USE = (
    Topic(
        ("the installation[ of llmrs]",),
        "Clone the repository and run make demo: it installs llmrs into .venv and runs the bundled model.",
        'By hand, make a virtual environment and run python -m pip install -e ".[torch]".',
        (
            "how (do i|can i|to) (install|set up|get|download|start with|try) llmrs?",
            "how (do i|can i|to) (get started|start|begin)[ with llmrs]?",
            "installation[ of llmrs][?]",
            "how is llmrs installed?",
            "what is make demo?",
            "i want to (install|try) llmrs.",
        ),
    ),
    Topic(
        ("llmrs run", "the run command", "the command llmrs run"),
        "Run llmrs run config.yaml. The file names the model and the prompts, and the answers are printed.",
        "Options can also be given as flags, such as --max-tokens 64.",
        (
            "how (do i|can i|to) (run|use|start) (llmrs|a model|a model with llmrs|the engine|prompts)?",
            "how (do i|can i|to) (complete|answer|run) prompts[ from a file]?",
            "(what|which) command runs a model?",
            "how do i run (my config|a config file|a yaml file|qwen3|llama 3|my model)?",
            "i want to run a model.",
        ),
    ),
    Topic(
        ("llmrs chat", "the chat command", "the command llmrs chat"),
        "Run llmrs chat to talk to a model in the terminal.",
        "It remembers what was said before in the same chat.",
        (
            "how (do i|can i|to) (chat|talk|speak) (with|to) (a model|you|the model)?",
            "how (do i|can i|to) (start|open) a chat?",
            "how can i (chat|talk) in the terminal?",
            "(what|which) command (starts a chat|is for chatting)?",
        ),
    ),
    Topic(
        ("llmrs graph", "the graph command", "the command llmrs graph"),
        "llmrs graph prints the graph of a model, for example llmrs graph demo.",
        "With --fused torch it prints the graph as the Torch backend runs it.",
        (
            "how (do i|can i|to) (see|print|show|view) (the graph|the graph of a model|a model's graph)?",
            "(what|which) command (prints|shows) the graph?",
        ),
    ),
    Topic(
        ("the commands[ of llmrs]", "the command line[ of llmrs]", "the llmrs command"),
        "llmrs has the commands run, chat and graph. Others, such as serve and quantize, are planned.",
        "",
        (
            "(what|which) commands (are there|does llmrs have|exist|can i use)?",
            "(list|name|show) [me ](the|all) commands.",
            "what can i (type|do) (in the terminal|on the command line)?",
            "how do i use llmrs (from the command line|in the terminal|in a shell)?",
        ),
    ),
    Topic(
        ("the python api[ of llmrs]", "the engine class"),
        "Make an Engine with an EngineConfig, then call generate_sync for whole answers or generate_stream for text "
        "as it comes.",
        "Close the engine at the end, or use it in a with statement.",
        (
            "how (do i|can i|to) use llmrs (from|in|with) python?",
            "(can i|how do i) (call|import|embed) llmrs (from|in) (python|my program|my app|my code)?",
            "does llmrs have a python api?",
            "how do i make an engine?",
        ),
    ),
    Topic(
        (),
        PYTHON_EXAMPLE,
        "",
        (
            "(show|give) me (an|a) [small |short ](example|program|code example) (in python|with python|in code).",
            "(show|give) me (python code|a python example|example code)[ for llmrs].",
            "what does (the python code|a python program) [with llmrs ]look like?",
            "write python code that uses llmrs.",
        ),
    ),
    Topic(
        (),
        YAML_EXAMPLE,
        "",
        (
            "(show|give) me (an example config|a config|a config file|a yaml file|an example of a config).",
            "what does (a config|a config file|config.yaml|the yaml file) look like?",
            "(write|make) (a config|a config file|config.yaml)[ for llmrs| for the demo model].",
            "(show|give) me an example (in yaml|of config.yaml).",
        ),
    ),
    Topic(
        ("(the config|config.yaml|the config file|the configuration|the yaml file)[ of llmrs]",),
        "A config is a flat YAML file. Its keys are the options, such as model, backend, dtype, temperature, "
        "max_tokens and prompts.",
        "The same names are used for the flags and for the Python arguments. docs/config.md lists them.",
        (
            "how (do i|can i|to) (configure|set up the config of|set options in) llmrs?",
            "(what|which) (options|keys|settings|config keys) (are there|does llmrs have|can i set)?",
            "where (do i|can i) (set|find|change) (the )[options|settings]?",
            "what can i put in (the config|config.yaml|the yaml file)?",
        ),
    ),
    Topic(
        ("generate_sync",),
        "generate_sync answers one or many prompts and returns when all answers are there.",
        "",
        ("how do i (answer|run) many prompts (at once|in python)?",),
    ),
    Topic(
        ("generate_stream", "streaming"),
        "Streaming means that you get the text while it is being made. In Python, generate_stream does it, and "
        "stream.cancel() stops it.",
        "",
        (
            "how (do i|can i|to) (stream|stream an answer|stream tokens|stream text)?",
            "does llmrs (stream|support streaming)?",
            "can i see the answer while it is (written|made|generated)?",
        ),
    ),
    Topic(
        (),
        "Call stream.cancel() in Python, or press Ctrl-C in the terminal.",
        "",
        (
            "how (do i|can i|to) (stop|cancel|interrupt|abort) (an answer|a request|the model|generation)?",
            "can i (stop|cancel) an answer?",
        ),
    ),
    Topic(
        ("apply_chat_template", "the chat template", "a chat template"),
        "A chat template turns a list of messages into the one text that a model was trained on. In llmrs, "
        "apply_chat_template does it.",
        "My own template is ChatML: control tokens mark where each message begins and ends.",
        ("why do i need a chat template?",),
    ),
    Topic(
        ("--output", "the output file"),
        "--output results.jsonl writes one JSON object for each request. Answers also go to the screen.",
        "",
        (
            "how (do i|can i|to) (save|store|write) (the answers|results|the results|the output)[ to a file]?",
            "how do i get json[ output]?",
        ),
    ),
    Topic(
        (),
        "Yes. llmrs answers many prompts at the same time; max_num_seqs says how many at most.",
        "",
        (
            "can llmrs (answer|run|handle|serve) (many|several|multiple) (prompts|requests|users|questions)[ at once]?",
            "can i (send|run|ask) (many|several|multiple) (prompts|requests|questions)[ at once]?",
            "does llmrs (batch|do batching|support batching)?",
        ),
        "Yes.",
    ),
    Topic(
        (),
        "Set temperature to 0 for the likeliest answer each time, or set a seed to get the same random answer again.",
        "",
        (
            "how (do i|can i) (get|have) the same answer[ again| every time| each time| twice]?",
            "how (do i|can i) make (answers|the answer|it|the output) (deterministic|repeatable|reproducible)?",
            "why is (the|your) answer different (each|every) time?",
        ),
    ),
    Topic(
        (),
        "Set a higher temperature, such as 1.0. Answers then vary more, and mistakes become more likely.",
        "",
        (
            "how (do i|can i) (get|have|make) (more random|more creative|more varied|different) answers?",
            "how (do i|can i) make (the answers|you|the model|it) more (random|creative|varied)?",
        ),
    ),
    Topic(
        (),
        "Set max_tokens to a larger number. An answer also ends when the model has said all.",
        "",
        (
            "how (do i|can i) (get|have|make) (longer|long) answers?",
            "how (do i|can i) make (the answer|answers) longer?",
            "why (is|was) the answer cut[ off]?",
            "why does the answer stop[ in the middle]?",
        ),
    ),
    Topic(
        (),
        "Set max_tokens to a smaller number, or give stop texts that end the answer.",
        "",
        (
            "how (do i|can i) (get|have|make) (shorter|short) answers?",
            "how (do i|can i) make (the answer|answers) shorter?",
            "how (do i|can i) limit the length of (an answer|the answer|answers)?",
        ),
    ),
    Topic(
        (),
        "Use a smaller max_model_len or max_num_seqs, a smaller model, or set kv_cache_memory or memory_fraction.",
        "",
        (
            "(i am|i'm|it is|llmrs is) (out of|running out of) memory.",
            "how (do i|can i) (save|limit|reduce) (memory|the memory)?",
            "(it|llmrs|the model) (needs|uses|takes) too much memory.",
            "what (can i do|helps) (when|if) (memory is short|there is not enough memory|memory runs out)?",
        ),
    ),
    Topic(
        (),
        "Not yet. Download the model and give its folder: Hugging Face names are planned.",
        "",
        (
            "can i (give|use) a hugging face (name|id)?",
            "(does|can) llmrs (download|fetch) models[ from hugging face| by itself]?",
            "how do i (download|get) a model[ from hugging face]?",
        ),
    ),
    Topic(
        (),
        "Set model in the config, or use the flag --model, with the folder of a Qwen3 or Llama 3 model.",
        "",
        (
            "how (do i|can i) (use|load|choose|change to|pick) (another|my own|a different|a bigger|a better) model?",
            "how (do i|can i) (change|choose|set) the model?",
            "can i use my own model?",
            "can i use a (bigger|larger|better) model?",
        ),
    ),
    Topic(
        ("(the tests|the test suite)[ of llmrs]", "make test"),
        "make test checks style, types and layout and runs the tests, on a machine with no GPU.",
        "",
        ("how (do i|can i|to) (run the tests|test llmrs)?", "does llmrs have tests?"),
    ),
    Topic(
        ("(an error|the errors) (of|in) llmrs",),
        "An error of llmrs names the value that is wrong, says what is allowed and gives a hint.",
        "",
        (
            "what happens (with|when i give) (bad|wrong) (input|options|values)?",
            "what (if|happens if) (an option|a key|my config) is wrong?",
            "i (got|get) an error. what does it mean?",
        ),
    ),
)
