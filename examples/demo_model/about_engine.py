"""Questions and answers about the internals of inference engines."""

from demo_model.dialogue import Topic

ENGINE = (
    Topic(
        ("paged kv", "the paged kv cache", "paged attention", "paging", "a paged kv cache", "paged memory"),
        "Paged KV means that the KV cache is cut into small blocks of equal size, and each request gets blocks only as "
        "it grows. So little memory is wasted.",
        "A block table says where the blocks of a request are, like the page table of an operating system.",
        (
            "why (is|does llmrs use) (the kv cache paged|paged kv|paging|a paged cache)?",
            "how does llmrs (store|manage|use) (the kv cache|its memory)?",
            "what is (good about|the advantage of|the benefit of) paged kv?",
            "paged kv cache, what is that?",
        ),
    ),
    Topic(
        ("the kv cache", "a kv cache", "kv cache", "kv"),
        "The KV cache keeps the keys and values of the tokens so far, so that they are not computed again for each new "
        "token.",
        "It grows with each token, and it is often what fills the memory.",
        ("why do i need a kv cache?", "what is (stored|kept) in the kv cache?", "why is there a kv cache?"),
    ),
    Topic(
        ("a block", "a kv block", "blocks", "a block of the kv cache"),
        "A block is a piece of the KV cache that holds a fixed number of tokens. Requests get blocks as they grow and "
        "give them back at the end.",
        "Blocks that nobody uses may stay cached until they are needed.",
        ("what are blocks[ for]?", "what is in a block?", "who (owns|holds) a block?"),
    ),
    Topic(
        ("a block table", "the block table"),
        "A block table lists which blocks of the KV cache belong to a request, in order.",
    ),
    Topic(
        ("continuous batching", "dynamic batching", "the batching[ of llmrs]"),
        "Continuous batching means that requests join and leave the batch at every step, so nobody waits until a whole "
        "batch is done.",
        "A step holds one token for each running answer, and parts of new prompts.",
        (
            "why (is|does llmrs use) continuous batching?",
            "how does llmrs (batch|batch requests|run many requests at once)?",
            "what is (good about|the advantage of|the benefit of) continuous batching?",
            "what is the difference between static and continuous batching?",
        ),
    ),
    Topic(
        ("a batch", "the batch", "batching"),
        "A batch is what runs together in one step: the tokens of many requests. One big step is faster than many "
        "small ones.",
        "",
        ("why (is|are) (batching|batches) (useful|fast|good)?",),
    ),
    Topic(
        ("the scheduler", "a scheduler", "scheduling"),
        "The scheduler decides which requests run in the next step. Running answers come first, then parts of waiting "
        "prompts up to a token budget.",
        "When no blocks are left, it preempts the newest request, which is computed again later.",
        (
            "(who|what) decides (what|who|which request) runs next?",
            "how does llmrs (choose|decide) (what|which request) (runs|to run)[ next]?",
            "in (what|which) order do requests run?",
            "what is the job of the scheduler?",
        ),
    ),
    Topic(
        ("preemption", "a preempted request", "preempting"),
        "Preemption means that the newest request gives its blocks back when memory runs out. It keeps its tokens and "
        "is computed again later.",
        "",
        (
            "what happens when (memory runs out|there are no blocks left|the blocks run out|the kv cache is full)?",
            "why was my request preempted?",
        ),
    ),
    Topic(
        ("prefill", "the prefill[ phase]"),
        "Prefill is the first phase of a request: the model reads all tokens of the prompt.",
        "After it comes decode, which makes one token at a time.",
    ),
    Topic(
        ("decode", "decoding", "the decode phase"),
        "Decode is the second phase of a request: the model makes the answer, one token at a time.",
        "",
        ("what is the difference between prefill and decode?",),
    ),
    Topic(
        ("chunked prefill", "a prompt chunk", "chunking"),
        "Chunked prefill means that a long prompt is split over several steps, so that it does not stall the running "
        "answers.",
        "",
        (
            "what happens (with|to) (a long prompt|long prompts)?",
            "why are long prompts split?",
            "does a long prompt (stall|block|slow) the (others|other answers)?",
        ),
    ),
    Topic(
        ("the prefix cache", "a prefix cache", "prefix caching", "prompt caching"),
        "The prefix cache keeps full blocks of earlier prompts. A new prompt with the same beginning reuses them and "
        "need not compute them again.",
        "Token numbers are compared, so a hit is always exact. The last token of a prompt is always computed.",
        (
            "why (is|does llmrs have) a prefix cache?",
            "what happens when (two prompts|prompts) (begin the same|have the same beginning|start the same)?",
            "what is (good about|the advantage of) a prefix cache?",
            "does llmrs (cache|reuse) prompts?",
        ),
    ),
    Topic(
        ("the ir", "an ir", "the intermediate representation", "ir in llmrs", "the llmrs ir", "ir"),
        "The IR is the small language in which each model's graph is written: equations with an operation, inputs, "
        "parameters and outputs.",
        "Each value is assigned once and has a type, and the graph can be printed and checked.",
        ("why does llmrs have an ir?", "what does ir (mean|stand for)?"),
    ),
    Topic(
        ("the model graph", "the graph", "a graph", "a model's graph"),
        "The graph says what a model computes, as a list of equations. It is written once for each family, and every "
        "backend runs it in its own way.",
        "llmrs graph prints it.",
        ("how is a model described[ in llmrs]?",),
    ),
    Topic(
        ("an equation", "an equation of the graph"),
        "An equation of the graph has an operation, inputs, parameters and outputs, such as a linear layer.",
    ),
    Topic(
        ("an op", "an operation", "the ops"),
        "An op is one kind of computation in the graph, such as embed, linear, rms_norm, rope, attend or add.",
        "",
        ("(what|which) ops (are there|does llmrs have)?",),
    ),
    Topic(
        ("a pass", "the passes", "graph passes"),
        "A pass rewrites the graph, for example to put several operations together into one that is faster.",
    ),
    Topic(
        ("a fused op", "fusion", "fused operations"),
        "A fused op does the work of several equations at once, which is faster. The equations that it replaces define "
        "it.",
    ),
    Topic(
        ("a step", "a step of the engine", "one step"),
        "In one step the engine runs the model once for a batch: each running answer gets its next token, and prompts "
        "are read further.",
        "",
        ("what happens in (a step|one step)?",),
    ),
    Topic(("a ticket",), "A ticket stands for a step that was launched. Waiting for it gives the new tokens."),
    Topic(("a request", "requests"), "A request is one prompt to be answered, with its sampling parameters."),
    Topic(
        ("sampling",),
        "Sampling is how the next token is chosen: the model gives each token a probability, and one is drawn.",
        "temperature, top_k, top_p and min_p change the probabilities first.",
        ("how is the next token (chosen|picked|made)?", "how does (a model|the model) choose (a token|a word)?"),
    ),
    Topic(
        ("greedy sampling", "greedy decoding", "greedy"),
        "Greedy sampling always takes the likeliest token. Set temperature to 0 for it.",
    ),
    Topic(
        ("gumbel noise", "the gumbel-max trick", "the noise in sampling"),
        "To draw a token, llmrs adds Gumbel noise to the logits and takes the largest. The noise depends only on seed, "
        "position and token.",
        "So an answer with a seed does not depend on the other requests.",
    ),
    Topic(
        ("logits", "a logit"),
        "Logits are the scores that a model gives to all tokens. The larger the score, the likelier the token.",
    ),
    Topic(
        ("detokenization", "the detokenizer"),
        "Detokenization turns tokens back into text. llmrs does it byte by byte, so that no letter is cut.",
    ),
    Topic(
        ("the end-of-sequence token", "eos", "the eos token", "an end token"),
        "The end-of-sequence token is what a model gives when its answer is complete. Mine is called im_end.",
        "",
        ("how does (the model|a model) know when to stop?", "when does an answer end?"),
    ),
    Topic(("throughput",), "Throughput is how many tokens an engine makes per second for all requests together."),
    Topic(
        ("latency", "the time to first token"),
        "Latency is how long one waits, for example for the first token of an answer.",
    ),
    Topic(
        ("cuda graphs", "a cuda graph"),
        "A CUDA graph records the work of a step, so that it can be replayed with little effort. In llmrs it is "
        "planned.",
    ),
    Topic(
        ("triton", "a triton kernel"),
        "Triton is a language for GPU programs, written in Python. llmrs is to use it for its own kernels.",
    ),
    Topic(("a kernel", "a gpu kernel"), "A kernel is a small program that runs on the GPU, in many threads at once."),
)
