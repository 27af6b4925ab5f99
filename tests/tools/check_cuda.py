"""On an NVIDIA GPU, python tests/tools/check_cuda.py FOLDER: how memory is shared out, and a checkpoint's speed."""

import sys
import time

import torch

from llmrs import Engine, EngineConfig, SamplingParams


def main(folder: str) -> None:
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    for dtype in ("bf16", "f32"):
        begin = time.perf_counter()
        with Engine(EngineConfig(folder, device="cuda:0", dtype=dtype, max_num_seqs=256)) as engine:
            free, total = torch.cuda.mem_get_info()
            print(f"{dtype}: loaded in {time.perf_counter() - begin:.1f} s; {(total - free) / 1e9:.2f} GB in use")
            for row in engine.memory_plan.table():
                print(f"  {row[0]:13}{row[1]}")
            params = SamplingParams(temperature=0.6, max_tokens=128, ignore_eos=True)
            for count in (1, 32, 256):
                begin = time.perf_counter()
                outputs = engine.generate_sync(params, [[3 + n] * 16 for n in range(count)])
                tokens = sum(o.decoded_length for o in outputs)
                print(f"  {count} requests: {tokens / (time.perf_counter() - begin):.0f} tokens/s")
        free, total = torch.cuda.mem_get_info()
        print(f"  closed: {(total - free) / 1e9:.2f} GB in use")


if __name__ == "__main__":
    main(sys.argv[1])
