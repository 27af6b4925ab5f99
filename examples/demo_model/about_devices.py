"""Questions and answers about backends, devices, models and formats, current and planned."""

from demo_model.dialogue import Topic

DEVICES = (
    Topic(
        ("the backends[ of llmrs]",),
        "llmrs has two backends today: Torch, for CPUs and NVIDIA GPUs, and a slow NumPy reference. A backend with MLX "
        "for Macs is planned.",
        "A package of your own can add another one through the entry point llmrs.backends.",
        (
            "(what|which) backends (are there|does llmrs have|exist|does llmrs support|can i use|are supported)?",
            "(list|name|show me) (the|all) backends.",
            "how many backends (are there|does llmrs have)?",
            "what (hardware|devices) does llmrs (support|run on|work on)?",
            "(on what|on which|what) (hardware|devices|machines|computers) (can|does) llmrs run[ on]?",
            "where does llmrs run?",
            "backends[?]",
        ),
    ),
    Topic(
        ("a backend", "the backend", "a backend in llmrs"),
        "A backend is the part of llmrs that runs a model on a device: it holds the weights and the KV cache, runs a "
        "step and samples tokens.",
        "It is a class that can be registered from outside, so a new device needs no change of the core.",
        ("what does a backend do?", "how do i (write|add|make) (a|my own) backend?"),
    ),
    Topic(
        ("the torch backend", "the pytorch backend"),
        "The Torch backend runs models with PyTorch, on the CPU and on NVIDIA GPUs with CUDA.",
        "Today it uses plain torch operations on the GPU. Triton kernels and CUDA graphs are planned.",
        (
            "does llmrs (use|support|need|work with) (torch|pytorch)?",
            "what is backend torch?",
            "when should i use the torch backend?",
        ),
    ),
    Topic(
        ("the reference backend", "backend reference", "the numpy backend"),
        "The reference backend runs the graph in NumPy, slowly and plainly. It defines what every operation means, and "
        "the other backends are tested against it.",
        "It is for checking, not for speed.",
        (
            "why is there a reference backend?",
            "why is the reference backend (so slow|slow)?",
            "what is reference in llmrs?",
            "does llmrs (use|have|need) numpy?",
            "how are backends tested?",
        ),
    ),
    Topic(
        ("the mlx backend", "backend mlx", "mlx in llmrs"),
        "The MLX backend is planned: it is to run models on Macs with Apple silicon. It is not there yet.",
        "The design gives it Metal kernels of its own.",
        (
            "does llmrs (support|have|use) (mlx|metal|apple silicon)?",
            "can i use mlx[ with llmrs]?",
            "when (will|does) the mlx backend (come|arrive)?",
            "is (there an mlx backend|mlx supported|mlx ready)[ yet]?",
        ),
        "Planned.",
    ),
    Topic(
        (),
        "On a Mac, llmrs can use the Torch backend on the CPU today. A faster MLX backend is planned.",
        "",
        (
            "(can|does) llmrs (run|work) on (a mac|macs|my mac|macos|apple silicon|an m1|an m4|my macbook|apple)?",
            "(is|are) (macs|mac|macos|apple) supported?",
            "i have a (mac|macbook). can i use llmrs?",
            "how do i use llmrs on a mac?",
        ),
    ),
    Topic(
        (),
        "Yes. The Torch backend runs on NVIDIA GPUs with CUDA. Set device to cuda:0, or leave it at auto.",
        "Triton kernels and CUDA graphs are planned.",
        (
            "(can|does) llmrs (run|work) on (a gpu|gpus|nvidia|an nvidia gpu|nvidia gpus|cuda|my graphics card)?",
            "does llmrs (support|use) (gpus|a gpu|cuda|nvidia|my gpu)?",
            "(are|is) (gpus|cuda|nvidia) supported?",
            "how do i (use|run llmrs on) (my gpu|the gpu|a gpu|cuda)?",
        ),
        "Yes.",
    ),
    Topic(
        (),
        "Yes. llmrs runs on the CPU with the Torch backend, and small models like me need no GPU.",
        "",
        (
            "(can|does) llmrs (run|work) on (a cpu|the cpu|cpus|my cpu|a laptop|my laptop)?",
            "(can i (use|run) llmrs|does llmrs (run|work)) without a gpu?",
            "do i need a (gpu|graphics card)[ for llmrs| to run llmrs| to run this]?",
            "does llmrs support (cpus|the cpu|cpu)?",
            "i have no gpu. can i use llmrs?",
        ),
        "Yes.",
    ),
    Topic(
        (),
        "No, not today. llmrs runs on CPUs and on NVIDIA GPUs; Macs with MLX are planned.",
        "",
        (
            "(can|does) llmrs (run|work) on (amd gpus|an amd gpu|amd|tpus|a tpu|intel gpus|a phone|rocm)?",
            "does llmrs support (amd|rocm|tpus|tpu|intel gpus|vulkan|phones|android|ios)?",
        ),
        "No.",
    ),
    Topic(
        (),
        "Yes. On Windows, make a virtual environment and install llmrs with pip instead of make.",
        "",
        (
            "(can|does) llmrs (run|work) on windows?",
            "does llmrs support windows?",
            "is windows supported?",
            "how do i (install|use) llmrs on windows?",
        ),
        "Yes.",
    ),
    Topic(
        (),
        "Yes. llmrs runs on Linux, on the CPU or on an NVIDIA GPU.",
        "",
        ("(can|does) llmrs (run|work) on (linux|ubuntu|debian)?", "does llmrs support linux?", "is linux supported?"),
        "Yes.",
    ),
    Topic(
        (),
        "Not today. llmrs uses one GPU; several GPUs are planned.",
        "",
        (
            "does llmrs support (several|multiple|many|two|more than one|multi) (gpus|gpu)?",
            "can (i|llmrs) use (several|multiple|two|four|more than one) gpus?",
            "does llmrs (have|support) tensor parallelism?",
        ),
        "No.",
    ),
    Topic(
        ("the (supported models|model families|models of llmrs)",),
        "llmrs runs Qwen3 and Llama 3 models today. More families are planned.",
        "I am a small Qwen3 model myself.",
        (
            "(what|which) models (does llmrs support|can llmrs run|work|can i run|are supported|can i use|are there)?",
            "(what|which) (model families|architectures|families) (does llmrs support|are supported)?",
            "(list|name) the [supported ]models.",
            "can llmrs run (qwen3|llama 3|llama|qwen|llama3)?",
            "does llmrs support (qwen3|llama 3|llama3|qwen|llama)?",
            "models[?]",
        ),
    ),
    Topic(
        ("qwen3", "qwen"),
        "Qwen3 is a family of language models. llmrs runs it, and I have the same architecture, only much smaller.",
        "It uses RMS norms on queries and keys, and grouped-query attention.",
    ),
    Topic(("llama 3", "llama3", "llama"), "Llama 3 is a family of language models that llmrs can run.", ""),
    Topic(
        (),
        "Not today. llmrs runs Qwen3 and Llama 3 models; more families are planned.",
        "",
        (
            "(can|does) llmrs (run|support) (mistral|gemma|phi|deepseek|glm|falcon|mixtral|gpt-2|gemma 3|phi 4|qwen2)?",
            "can i (use|run) (mistral|gemma|phi|deepseek|glm|falcon|mixtral|gpt-2|qwen2)[ with llmrs]?",
            "(is|are) (mistral|gemma|phi|deepseek|glm|mixtral) supported?",
            "does llmrs support (mixture of experts|moe models|moe|vision models|images)?",
        ),
        "No.",
    ),
    Topic(
        ("the (file formats|weight formats|formats)[ of llmrs]",),
        "llmrs reads safetensors files today. GGUF is to follow.",
        "",
        (
            "(what|which) (formats|file formats|weight formats|files) (does llmrs (support|read|load)|are supported)?",
            "(what|which) format (must|should) (the weights|my model|a model) (have|be in)?",
            "(what|which) model files can llmrs (read|load)?",
        ),
        "Safetensors.",
    ),
    Topic(
        ("safetensors", "a safetensors file"),
        "safetensors is a file format for weights that holds only numbers and no code, so it is safe to load. llmrs "
        "reads it.",
        "",
        ("(does|can) llmrs (support|read|load) safetensors?",),
    ),
    Topic(
        ("gguf", "a gguf file"),
        "GGUF is a file format for models, often with quantized weights. llmrs can't read it yet; it is planned.",
        "",
        (
            "(does|can) llmrs (support|read|load|use|run) gguf[ files]?",
            "can i (use|load|run) (a gguf file|gguf files|gguf)?",
            "is gguf supported[ yet]?",
        ),
        "Planned.",
    ),
    Topic(
        ("quantization", "quantisation", "(q4k|q8_0|q4_k_m)", "a quantized model"),
        "Quantization stores weights in fewer bits, so that a model takes less memory. In llmrs it is planned, not "
        "there yet.",
        "The design has q4k and q8_0, for example.",
        (
            "(does|can) llmrs (support|do|use) (quantization|quantized models|4-bit|8-bit|4 bit models)?",
            "can i quantize a model[ with llmrs]?",
            "how do i (quantize|use quantization)?",
            "can i run a model in 4 bits?",
        ),
        "Planned.",
    ),
    Topic(
        ("the (server|api server|http api|openai api)[ of llmrs]", "llmrs serve"),
        "A server with an OpenAI-compatible API is planned for llmrs. Today there are the commands run and chat, and "
        "the Python API.",
        "",
        (
            "(does|can) llmrs (have|run as|start) (a|an) (server|api|http server|openai api|web server)?",
            "how do i (serve a model|start a server|start the server|run a server)?",
            "(can i use|does llmrs support) the openai (api|client)?",
            "is there (a server|a web page|a chat page|an api)?",
        ),
        "Planned.",
    ),
    Topic(
        (),
        "No. llmrs loads no pickled weights and no code from model folders, because both could harm your machine.",
        "",
        (
            "(does|can) llmrs (load|read|support) (pickle|pickled|pytorch|.bin|.pt) (files|weights|models)?",
            "(does|can) llmrs run (remote code|code from a model|custom code)?",
            "is it safe to load a model[ with llmrs]?",
        ),
        "No.",
    ),
    Topic(
        ("(structured output|json mode|a json schema)[ in llmrs]",),
        "Structured output makes a model answer in a given form, such as JSON. In llmrs it is planned, not there yet.",
        "",
        ("does llmrs support (structured output|json mode|json schemas|grammars)?",),
        "Planned.",
    ),
)
