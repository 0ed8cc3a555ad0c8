"""`llama inspect`: what a checkpoint is, and the memory that it needs."""


def inspect(path: str, *, max_seq_len: int = 2048, max_batch_size: int = 8) -> None:
    """Describe a checkpoint, and the memory that it needs on each of 1, 2, 4, ... ranks.

    Args:
        path: a directory in Meta's or Hugging Face's format, or a .gguf file; remote ones are
            downloaded first.
        max_seq_len: tokens of prompt and answer together, for the cache.
        max_batch_size: sequences computed at once, for the cache.
    """
    import math
    from dataclasses import replace

    import torch

    from llama import checkpoint
    from llama.backends import cpu, memory
    from llama.backends.options import ModelOptions
    from llama.checkpoint import convert, remote
    from llama.families.registry import family_of
    from llama.layers.parallel import pick_dtype

    ModelOptions(path, max_seq_len=max_seq_len, max_batch_size=max_batch_size)  # checks them
    source = checkpoint.open(remote.local_path(path))
    about = convert.describe(source)
    args = replace(source.args, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    print(f"{source.path}: {about.format}, {about.parameters:,} parameters")
    print("stored as: " + ", ".join(f"{kind} {memory.size(n)}" for kind, n in about.bytes.items()))
    for kind, becomes in about.kept.items():
        print(f"  {kind}: in memory {becomes} dense; activations aren't quantized")
    if left_out := getattr(source, "left_out", 0):
        print(f"left out: {left_out} weights that this network doesn't use")
    print(f"tokenizer: {source.tokenizer_path or 'none'}")
    way, obstacle = "by the CPU kernels", None
    try:
        cpu.check_shape(args, torch.device("cpu"), torch.float32, 1)
    except ValueError as error:
        obstacle = error
        way = f"on a CPU by plain layers, several times slower: {obstacle}"
    print(f"network: {family_of(args).name}, computed {way}")
    sees = getattr(args, "vision_layers", None)
    for field, value in vars(args).items():
        hidden = field.startswith("vision_") and not sees
        if field not in ("max_seq_len", "max_batch_size") and not hidden:
            print(f"  {field} = {value}")
    checkpoint.check_shapes(source)
    print(f"memory per rank with a cache of {max_batch_size} rows of {max_seq_len} tokens:")
    heads = math.gcd(args.n_heads, args.vision_heads if sees else args.n_heads)  # type: ignore[attr-defined]
    for world in (w for w in range(1, heads + 1) if heads % w == 0):
        for dtype in ("bf16", "fp32"):
            need = memory.estimate(args, world, pick_dtype(dtype, torch.device("cpu")))
            print(f"  {world:3} rank{'s' if world > 1 else ' '} {dtype}: {need}")
        dense = memory.estimate(args, world, torch.bfloat16).weights
        need = memory.estimate(args, world, torch.bfloat16, "stored", source=source)
        if about.kept or (obstacle is None and need.weights < dense):
            print(f"  {world:3} rank{'s' if world > 1 else ' '} as stored, bf16: {need}")
