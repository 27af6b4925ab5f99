"""Questions and answers about the config's keys, as core/options.py defines them."""

from demo_model.dialogue import Topic


def key_topic(name: str, words: str, answer: str, *asks: str) -> Topic:
    """The topic of a config key; `words`: a template of other names for it."""
    alias = f"({name}|{words})" if words else name
    return Topic(
        (name, f"{name} in the config", f"the (key|option|setting|parameter) {name}", *([words] if words else [])),
        answer,
        "",
        (
            f"what does {name} (do|mean|set|change|control)?",
            f"what is {name}[ in llmrs| in the config| for| in config.yaml]?",
            f"how (do i|can i|to) (set|use|change|choose) {alias}?",
            f"(what|which) value should {name} have?",
            f"what is the default (of|for) {name}?",
            f"what (can i put for|values can i give for|values does) {name}[ have| take]?",
            f"what happens (if i|when i) (set|change|leave out) {name}?",
            f"(explain|describe) (the option|the key|the setting|) {name}.",
            f"{name}[?]",
            *asks,
        ),
    )


KEYS = (
    key_topic(
        "model",
        "the model key",
        "model says which model to load: demo, or the folder of a model. For example: model: demo.",
        "what is model_path?",
    ),
    key_topic(
        "backend",
        "the backend key",
        "backend chooses what runs the model: auto, torch or reference. mlx is planned. For example: backend: torch.",
        "how (do i|can i) (choose|change|set|pick|select) the backend?",
        "(what|which) backend (is the default|is used|should i use)?",
        "what does backend auto mean?",
    ),
    key_topic(
        "device",
        "the device key",
        "device says where the backend runs: auto, cpu or cuda:0, for example.",
        "how (do i|can i) (choose|change|set|pick) the (device|gpu)?",
    ),
    key_topic(
        "dtype",
        "(the data type|the number type)",
        "dtype is the number type of the computation: bf16, f16 or f32. The default is bf16; f32 is the most exact.",
        "(what|which) (dtypes|data types|number types) (are there|does llmrs have|can i use)?",
        "what is the difference between bf16 and (f16|f32)?",
        "should i use bf16 or (f16|f32)?",
    ),
    Topic(
        ("bf16", "bfloat16", "f16", "f32", "float32", "float16"),
        "bf16, f16 and f32 are number types of 16, 16 and 32 bits. f32 is the most exact; bf16 and f16 need half the "
        "memory.",
    ),
    key_topic(
        "kv_cache_dtype",
        "the type of the kv cache",
        "kv_cache_dtype is the number type of the KV cache: auto, bf16, f16 or f32. auto takes that of dtype.",
    ),
    key_topic(
        "quant",
        "the quant key",
        "quant is to quantize a model while it loads, for example quant: q4k. That is planned, not there yet.",
    ),
    key_topic(
        "max_model_len",
        "(the longest context|the maximum context|the context limit)",
        "max_model_len is the longest prompt plus answer, in tokens. By default it is what the model allows, at most "
        "4096.",
        "how long can (a prompt|a conversation|a text|the context) be?",
        "what is the maximum length (of a prompt|of a conversation)?",
    ),
    key_topic(
        "max_num_seqs",
        "the number of requests at once",
        "max_num_seqs is how many requests run at once. The default is 32, and 8 on macOS.",
        "how many (requests|prompts|sequences|users) (run|can run|can llmrs run|can i run) at once?",
        "how do i run more requests at once?",
    ),
    key_topic(
        "max_num_batched_tokens",
        "the token budget[ of a step]",
        "max_num_batched_tokens is the most tokens of one step, 2048 by default. Longer prompts are split.",
        "how many tokens does one step have?",
    ),
    key_topic(
        "block_size",
        "the size of a block",
        "block_size is how many tokens a block of the KV cache holds. By default the backend chooses it.",
        "how (big|large) is a block?",
        "how many tokens (are in|does) a block[ hold]?",
    ),
    key_topic(
        "kv_cache_memory",
        "the memory of the kv cache",
        "kv_cache_memory is how many bytes the KV cache may take. By default llmrs goes by need and free memory.",
        "how (much memory|big) (is|does) the kv cache[ take]?",
    ),
    key_topic(
        "memory_fraction",
        "the memory fraction",
        "memory_fraction is the part of the free memory that llmrs may use, 0.9 by default.",
        "how much memory (does llmrs use|may llmrs use|will llmrs take)?",
    ),
    key_topic(
        "prefix_cache",
        "the prefix_cache key",
        "prefix_cache turns the reuse of equal beginnings of prompts on or off. It is on by default.",
        "how do i turn (the prefix cache|prefix caching) (off|on)?",
        "is (the prefix cache|prefix caching) on[ by default]?",
    ),
    key_topic(
        "temperature",
        "the temperature[ in sampling]",
        "temperature says how random the answers are. 0 always takes the likeliest token; higher is more random.",
        "(what|which) temperature should i (use|set)?",
        "what is a (good|low|high) temperature[ for a model| for sampling]?",
        "what does temperature 0 mean?",
        "how random are the answers?",
    ),
    key_topic(
        "max_tokens",
        "(the longest answer|the limit of the answer|the maximum length of an answer)",
        "max_tokens is the most tokens of an answer, 4096 by default.",
        "how long can an answer be?",
        "how many tokens (can|may) an answer have?",
    ),
    key_topic("top_k", "(top-k|top k)", "top_k keeps only the k likeliest tokens. 0 keeps all of them."),
    key_topic(
        "top_p",
        "(top-p|top p|nucleus sampling)",
        "top_p keeps the likeliest tokens that together make up this probability, such as 0.95.",
    ),
    key_topic(
        "min_p", "(min-p|min p)", "min_p drops the tokens that are less likely than this part of the likeliest one."
    ),
    key_topic(
        "seed",
        "(the random seed|the seed|a seed)",
        "seed fixes the random choices: the same seed gives the same answer. Without it they differ each time.",
    ),
    key_topic(
        "ignore_eos",
        "the ignore_eos flag",
        "ignore_eos makes the model go on after its end token, until max_tokens. It is useful for benchmarks.",
    ),
    key_topic(
        "stop",
        "(stop strings|a stop string|stop texts|stop words)",
        "stop is a list of texts that end the answer. The answer stops before the first of them.",
        "how (do i|can i) (end|stop) an answer at a word?",
    ),
    key_topic("stop_token_ids", "stop tokens", "stop_token_ids is a list of token numbers that end the answer."),
    key_topic(
        "prompts",
        "the prompts key",
        'prompts is the list of what to answer, for example prompts: ["How are you?", "What is 7 + 5?"].',
        "how (do i|can i) (give|write|set) (prompts|several prompts|my prompts|my questions)?",
        "where do i (put|write) my (questions|prompts)?",
    ),
    Topic(
        ("chat: false", "the chat key", "plain completion", "text completion"),
        "With chat: false a prompt is completed as plain text. Otherwise it is answered as a message.",
        "",
        (
            "how (do i|can i) (complete|continue) (plain text|a text)?",
            "what is the difference between chat and completion?",
            "what does chat false (do|mean)?",
        ),
    ),
)
