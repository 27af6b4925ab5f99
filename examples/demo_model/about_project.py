"""Questions and answers about llmrs: purpose, platforms, plans. Only true statements."""

from demo_model.dialogue import Topic

PROJECT = (
    Topic(
        ("llmrs", "llmrs", "the llmrs (project|engine|program|package|library)", "this (project|program|tool)"),
        "llmrs is a small inference engine for language models, written in Python and made to be read.",
        "It loads a model, takes many requests at once and streams the answers. One core of under 1,000 lines decides "
        "what runs next, and a backend runs it on a device.",
        (
            "what is this?",
            "what does (llmrs|this project) do?",
            "what (am i using|is this thing|is this software)?",
            "what is (the idea of|the purpose of|the point of|the goal of) llmrs?",
            "what can (i|you) do with llmrs?",
            "(explain|describe|summarize) llmrs in one sentence.",
            "what kind of (software|program|project|tool) is llmrs?",
            "is llmrs a (language model|model|chatbot|program|library)?",
        ),
    ),
    Topic(
        ("the audience of llmrs",),
        "llmrs is for people who want to run language models on their own machine, and for people who want to read "
        "and understand how an inference engine works.",
        "",
        (
            "who is (llmrs|it|this) for?",
            "(who|what kind of people) (uses|should use|would use|needs) llmrs?",
            "is llmrs (for me|for beginners|for students|for developers|for researchers)?",
            "for whom is llmrs[ made| meant| written]?",
            "what are the users of llmrs?",
        ),
    ),
    Topic(
        (),
        "llmrs is small enough to read in an evening. Its core has under 1,000 lines and knows no device, and each "
        "model is described only once, as a graph.",
        "In float32 it gives the same tokens on every backend, whatever else is in the batch.",
        (
            "(why|when) should i use llmrs?",
            "what is (special|different|new|good|interesting|nice) about llmrs?",
            "what makes llmrs (special|different|good)?",
            "why (llmrs|would i use llmrs|does llmrs exist|was llmrs made)?",
            "what are the (advantages|benefits|strengths|features|main ideas) of llmrs?",
            "how is llmrs different[ from other engines| from others]?",
        ),
    ),
    Topic(
        ("the name llmrs",),
        "I was not told what the name stands for. llmrs re-implements vllm.rs in Python.",
        "",
        (
            "what does llmrs stand for?",
            "why is it called llmrs?",
            "where does the name llmrs come from?",
            "what does the name llmrs mean?",
            "how do (i|you) (say|pronounce) llmrs?",
        ),
    ),
    Topic(
        ("vllm.rs", "vllm rs", "the rust engine vllm.rs"),
        "vllm.rs is an inference engine written in Rust. llmrs re-implements it in Python.",
        "",
        (
            "is llmrs (related to|the same as|based on|a copy of|a port of) vllm.rs?",
            "what is (the difference between llmrs and vllm.rs|llmrs based on)?",
            "is llmrs (written in|a) rust[ program]?",
            "does llmrs use rust?",
        ),
    ),
    Topic(
        ("(vllm|llama.cpp|ollama|sglang|mlx-lm|nano-vllm|lm studio)",),
        "That is another program that runs language models. llmrs is meant to be small and easy to read.",
        "",
        (
            "how does llmrs compare (to|with) (vllm|llama.cpp|ollama|sglang|transformers|mlx-lm)?",
            "what is the difference between llmrs and (vllm|llama.cpp|ollama|sglang|mlx-lm)?",
            "is llmrs like (vllm|llama.cpp|ollama|sglang)?",
        ),
    ),
    Topic(
        (),
        "Speed is a goal of llmrs, but I know no measurements, so I can't say how fast it is.",
        "",
        (
            "how fast is llmrs?",
            "is llmrs (fast|slow|quick|faster than vllm|faster than llama.cpp|faster than ollama)?",
            "how many tokens per second does llmrs (do|make|reach)?",
            "what is the (speed|performance|throughput) of llmrs?",
            "do you have benchmarks[ of llmrs]?",
        ),
    ),
    Topic(
        ("(the license|the licence)[ of llmrs]", "apache-2.0", "the apache (license|licence)"),
        "llmrs has the Apache-2.0 licence, so you may use, change and share it.",
        "The text is in the file LICENSE.",
        (
            "(what|which) (license|licence) does llmrs (have|use)?",
            "under (what|which) (license|licence) is llmrs[ released| published]?",
            "is llmrs (free|open source|open|free to use|free software)?",
            "can i use llmrs (at work|in my company|for free|commercially|in a product)?",
            "how is llmrs (licensed|licenced)?",
            "how much does llmrs cost?",
            "(license|licence)[?]",
        ),
        "Apache-2.0.",
    ),
    Topic(
        (),
        "llmrs is written in Python. The Torch backend uses PyTorch, and the reference backend uses NumPy.",
        "",
        (
            "(what|which) (programming language|language) is llmrs (written|made|programmed|implemented) in?",
            "in (what|which) language is llmrs written?",
            "is llmrs (written in|made with) (python|c|c++|java|go)?",
            "(what|which) language does llmrs use?",
        ),
        "Python.",
    ),
    Topic(
        (),
        "llmrs needs Python 3.11 or later.",
        "",
        (
            "(what|which) (version of python|python version|python) (does llmrs need|do i need|is needed)?",
            "does llmrs (work|run) (with|on) python 3.(8|9|10|11|12|13)?",
            "(what|which) python[ version]?",
            "what are the requirements[ of llmrs]?",
            "what do i need to (run|install|use) llmrs?",
        ),
    ),
    Topic(
        ("the core[ of llmrs]",),
        "The core of llmrs is what is the same on every device: scheduler, blocks, batch, sampling, engine and the "
        "graph language. It has under 1,000 lines and imports only NumPy.",
        "It never sees text or files: those belong to the other parts.",
        (
            "what is in the core?",
            "how (big|large|long|small) is (the core|llmrs|the code)?",
            "how many lines (does llmrs have|does the core have|of code is llmrs)?",
            "does the core (import|use|need) (torch|pytorch|cuda|mlx)?",
        ),
    ),
    Topic(
        ("the (folders|directories|structure|layout) of (llmrs|the repository|the code)",),
        "The folders are core, backends, models, quant, cli, llmrs, docs and tests.",
        "docs/architecture.md explains one step from text to text.",
        (
            "how is (llmrs|the code|the repository) (organized|structured|laid out)?",
            "where (is|do i find) the (code|source)[ of llmrs]?",
            "(what|which) (folders|parts) does llmrs have?",
            "what are the parts of llmrs?",
        ),
    ),
    Topic(
        (),
        "Read docs/architecture.md for how it works, docs/config.md for the options, and the README to begin.",
        "",
        (
            "where (is|are|can i find|do i find) the (documentation|docs|manual)?",
            "(is there|does llmrs have) (documentation|a manual|docs)?",
            "where can i (read|learn) more[ about llmrs]?",
            "how (can|do) i learn more about llmrs?",
            "what should i read first?",
        ),
    ),
    Topic(
        (),
        "Please open an issue in the repository, with your config and the error message.",
        "",
        (
            "(how|where) (can|do) i report a (bug|problem|mistake|issue)?",
            "i (found|have found) a bug[ in llmrs].",
            "llmrs (crashed|does not work|doesn't work|is broken|gives an error).",
            "(who|where) can i ask for help with llmrs?",
        ),
    ),
    Topic(
        (),
        "Read CONTRIBUTING.md, change the code, run make test and open a pull request.",
        "",
        (
            "how (can|do) i (contribute|help)[ to llmrs]?",
            "can i (contribute to|work on|help with|change|improve) llmrs?",
            "do you (take|accept) pull requests?",
        ),
    ),
    Topic(
        (),
        "llmrs is an open project under the Apache-2.0 licence. I don't know the people behind it.",
        "",
        (
            "who (made|wrote|created|develops|built|owns|maintains) llmrs?",
            "who is (the author|the developer|the creator|behind) [of ]llmrs?",
            "(what company|which company) (made|owns) llmrs?",
        ),
    ),
    Topic(
        (),
        "No. With llmrs the model runs on your own machine, and your text is not sent anywhere.",
        "",
        (
            "does llmrs (send|share|store|collect|upload) my (data|text|prompts|messages)[ anywhere]?",
            "does llmrs (need|use) (the internet|the cloud|an account|an api key)?",
            "is my data sent (away|to a server|to the cloud)?",
            "do i need (the internet|an api key|an account)[ to use llmrs| for this]?",
        ),
        "No.",
    ),
    Topic(
        (),
        "Yes. llmrs runs on your own machine, and once a model is on your disk it needs no internet.",
        "",
        (
            "(is llmrs|is my text|is it) (private|safe)?",
            "does llmrs (run|work) (offline|locally|on my own machine|on my own computer|on my laptop)?",
            "can i run llmrs (offline|locally|at home|without the internet)?",
        ),
        "Yes.",
    ),
    Topic(
        (),
        "No. llmrs only runs models; it does not train them.",
        "This demo model is the exception: its training script is examples/demo_model/train.py.",
        (
            "can llmrs (train|fine-tune|finetune) (models|a model)?",
            "can i (train|fine-tune|finetune) (a model|my model|models) with llmrs?",
            "does llmrs (train|support training|do training|support fine-tuning)[ models]?",
            "how do i (train|fine-tune) a model with llmrs?",
        ),
        "No.",
    ),
    Topic(
        ("an inference engine", "an llm engine", "an inference server"),
        "An inference engine runs a trained language model: it turns prompts into answers. It does not train models.",
        "A good one answers many requests at once and uses memory with care.",
        ("what does an inference engine do?", "why do i need an inference engine?"),
    ),
)
