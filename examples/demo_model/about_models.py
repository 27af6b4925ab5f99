"""Questions and answers about language models in general."""

from demo_model.dialogue import Topic

MODELS = (
    Topic(
        ("a token", "tokens", "tokens in a language model"),
        "A token is a piece of text, such as a word or a part of one. Models read and write tokens, each with a "
        "number.",
        "My vocabulary has 2048 tokens; every digit is a token of its own.",
        ("why are there tokens?", "is a token a word?", "how long is a token?"),
    ),
    Topic(
        ("a tokenizer", "the tokenizer", "tokenization"),
        "A tokenizer cuts text into tokens and gives each its number. Mine is a byte-level BPE with 2048 tokens.",
        "",
        ("how is text cut into tokens?", "how do you read text?"),
    ),
    Topic(
        ("bpe", "byte pair encoding"),
        "BPE builds tokens from frequent pairs: it begins with bytes and joins the pair that is seen most, again and "
        "again.",
    ),
    Topic(
        ("a prompt", "the prompt"),
        "A prompt is the text that you give to a model. The model continues it or answers it.",
    ),
    Topic(
        ("a system message", "a system prompt"),
        "A system message comes before the conversation and says how the model should answer.",
    ),
    Topic(
        ("a language model", "an llm", "a large language model", "llm", "language models"),
        "A language model is a program that has learned from text which token is likely to come next. So it can answer "
        "and write.",
        "It does this again and again, one token at a time.",
        ("how does a language model (write|answer|work)?", "how do language models work?"),
    ),
    Topic(
        ("(ai|artificial intelligence|an ai)", "machine learning"),
        "AI means programs that do things which seem to need thinking, such as answering questions. I am a very small "
        "example.",
    ),
    Topic(
        ("a neural network", "neural networks", "deep learning"),
        "A neural network is a program made of many simple sums with weights. It learns by changing the weights.",
    ),
    Topic(
        ("weights", "the weights[ of a model]", "parameters", "a parameter", "model weights"),
        "Weights, or parameters, are the numbers that a model has learned. I have about 3.7 million of them.",
    ),
    Topic(
        ("a transformer", "the transformer", "transformers"),
        "A transformer is the kind of network that most language models are: layers of attention and feed-forward "
        "parts.",
    ),
    Topic(
        ("attention", "self-attention"),
        "Attention lets a model look back at earlier tokens and take from them what matters for the next one.",
    ),
    Topic(
        ("grouped-query attention", "gqa"),
        "In grouped-query attention several query heads share one key and value head, so the KV cache is smaller.",
    ),
    Topic(
        ("rope", "rotary position embedding"),
        "RoPE tells attention where a token stands: it rotates queries and keys by an angle that depends on the "
        "position.",
    ),
    Topic(
        ("rms norm", "rmsnorm", "rms_norm"),
        "RMS norm scales a vector so that its size stays about the same from layer to layer.",
    ),
    Topic(
        ("an embedding", "embeddings"), "An embedding is the list of numbers that stands for a token inside a model."
    ),
    Topic(
        ("a layer", "layers[ of a model]"),
        "A layer is one stage of a model. Each takes what the one before gave and changes it a little.",
    ),
    Topic(
        ("the context length", "the context window", "a context"),
        "The context length is how many tokens a model can look at, prompt and answer together. Mine is 4096.",
        "",
        ("how (long|big) is your context?", "how much (text|can) can you read[ at once]?"),
        "4096.",
    ),
    Topic(
        ("training", "the training of a model"),
        "In training, a model reads much text and changes its weights so that it predicts the next token better.",
        "",
        ("how does a model learn?", "how are models trained?"),
    ),
    Topic(
        ("inference",),
        "Inference is using a trained model: it reads a prompt and makes an answer. That is what llmrs does.",
        "",
        ("what is the difference between training and inference?",),
    ),
    Topic(
        ("a hallucination", "hallucination", "hallucinating"),
        "A hallucination is when a model says something false as if it were true. It happens to me too.",
    ),
    Topic(
        ("a gpu", "a graphics card", "gpus"),
        "A GPU is a chip that does very many sums at the same time, so it runs models fast.",
    ),
    Topic(("a cpu", "a processor"), "A CPU is the main chip of a computer. It runs small models well."),
    Topic(
        ("pytorch", "torch"), "PyTorch is a library for neural networks in Python. llmrs uses it in the Torch backend."
    ),
    Topic(("numpy",), "NumPy is a Python library for arrays of numbers. The reference backend of llmrs uses it."),
    Topic(("mlx",), "MLX is a library by Apple for machine learning on Macs. A backend with it is planned for llmrs."),
    Topic(("metal",), "Metal is how programs use the GPU of a Mac. The planned MLX backend is to have Metal kernels."),
    Topic(("cuda",), "CUDA is how programs use NVIDIA GPUs. The Torch backend of llmrs runs on CUDA."),
    Topic(
        ("yaml", "a yaml file"), "YAML is a simple text format for settings. llmrs reads its config from a YAML file."
    ),
    Topic(("python",), "Python is a programming language that is easy to read. llmrs is written in it."),
    Topic(("rust",), "Rust is a programming language. vllm.rs is written in it, and llmrs is not: llmrs is Python."),
    Topic(
        ("open source",), "Open source means that everybody may read, use and change the code. llmrs is open source."
    ),
    Topic(("json",), "JSON is a text format for data. With --json, llmrs writes one JSON object for each request."),
    Topic(("hugging face",), "Hugging Face is a website where many models are shared."),
    Topic(
        ("a computer", "computers"), "A computer is a machine that follows programs. I am a program that runs on one."
    ),
    Topic(("the internet",), "The internet connects computers all over the world. I have no access to it."),
)
