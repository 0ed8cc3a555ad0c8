"""The CPU's kernels compute what model.py does, whatever the batch, the context and the weights."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref
from dataclasses import replace
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    THOROUGH,
    TINY,
    forked_python,
    random_model,
    random_weights,
    run_ranks,
    write_checkpoint,
)

from benchmarks import shapes
from llama import Llama, ModelArgs, Transformer, checkpoint
from llama.backends import cpu as native
from llama.backends import quantized as quantize
from llama.backends.cpu import kernels
from llama.backends.cpu.layers import NativeTransformer
from llama.backends.cpu.packing import arena_for
from llama.backends.cpu.workspace import FLOATS, Workspace
from llama.backends.quantized import Blocks
from llama.checkpoint import InMemory, floats, ggml, integers
from llama.layers import parallel
from llama.layers.cache import Int8KVCache, KVCache
from llama.text.gguf_header import read_header


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """Kernels share rows out to threads, and the tests run with one (conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SMALL = replace(
    TINY, dim=128, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=192, max_seq_len=2048
)
SHAPES = {
    "grouped": SMALL,
    "one key head": replace(SMALL, n_kv_heads=1),
    "all key heads": replace(SMALL, n_kv_heads=4),
    "eight to one": replace(SMALL, dim=256, n_heads=8, n_kv_heads=1),
    "heads of 64": replace(SMALL, n_heads=3, n_kv_heads=3, head_dim=64),
    "heads of 128": replace(SMALL, n_heads=2, n_kv_heads=1, head_dim=128),
    "tied, odd vocabulary": replace(SMALL, tied_embeddings=True, vocab_size=509),
}


def pair(args: ModelArgs, kind=None, dtype=torch.float32):
    """A model as it is read, and the same with the kernels' layers."""
    parallel.initialize(device="cpu")

    def build() -> Transformer:
        source, model = InMemory(args, random_weights(args)), Transformer(args, device="meta")
        if kind:
            return quantize.load(source, model, kind, dtype=dtype)
        return checkpoint.load(source, model, dtype=dtype)

    return build(), native.swap(build())


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(500, shape, generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest, against the size of the values."""
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.inference_mode()
def stepped(model: Transformer, tokens: torch.Tensor, prompt: int, step: int = 1) -> torch.Tensor:
    """Logits by way of a cache: a prompt, then some tokens at a time."""
    cache = model.new_cache(len(tokens))
    found = [model(tokens[:, :prompt], 0, cache)]
    for at in range(prompt, tokens.shape[1], step):
        found.append(model(tokens[:, at : at + step], at, cache))
    return torch.cat(found, 1)


# --- the same as model.py ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 7, 8, 100, 600])
def test_a_forward_is_the_models(name, length):
    eager, compiled = pair(SHAPES[name])
    tokens = ids(2, length)
    with torch.inference_mode():
        assert difference(compiled(tokens), eager(tokens)) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prompt, step", [(1, 1), (40, 1), (40, 7), (3, 50)])
def test_cached_is_uncached(name, prompt, step):
    eager, compiled = pair(SHAPES[name])
    tokens = ids(2, 60)
    with torch.inference_mode():
        expected = eager(tokens)
    assert difference(stepped(compiled, tokens, prompt, step), expected) < 1e-5


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_blocks_mean_what_they_mean_to_the_plain_layers(kind):
    """Up to the rounding of activations to 16 bits, in each of two layers' products."""
    eager, compiled = pair(SMALL, kind)
    for length in (1, 20, 100):
        with torch.inference_mode():
            assert difference(compiled(ids(1, length)), eager(ids(1, length))) < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention_over_chunks_of_keys_is_softmax(scale):
    """1300 keys are three chunks; with large scores one key takes all, with small ones none."""
    args = replace(SMALL, n_layers=1)
    weights = random_weights(args)
    weights["layers.0.attention.wq.weight"] *= scale
    parallel.initialize(device="cpu")
    eager, compiled = (
        checkpoint.load(InMemory(args, weights), Transformer(args, device="meta")) for _ in "ab"
    )
    native.swap(compiled)
    tokens = ids(1, 1300)
    with torch.inference_mode():
        expected = eager.double()(tokens)[:, -40:] if scale == 30.0 else eager(tokens)[:, -40:]
        whole = compiled(tokens)[:, -40:]
    assert difference(whole, expected.float()) < 2e-5
    assert difference(stepped(compiled, tokens, 1260)[:, -40:], expected.float()) < 2e-5


def test_rows_stand_at_their_own_positions():
    eager, compiled = pair(SMALL)
    lengths = [3, 700, 41]
    with torch.inference_mode():
        caches = []
        for model in (eager, compiled):
            cache = model.new_cache(3)
            model(ids(3, 700), 0, cache)
            cache.truncate(lengths)
            caches.append(model(ids(3, 2, seed=1), lengths, cache))
    assert difference(caches[1], caches[0]) < 1e-5


@pytest.mark.parametrize("cache_type", [KVCache, Int8KVCache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, *quantize.KINDS])
@pytest.mark.slow
def test_a_token_is_the_same_to_the_bit_whatever_is_computed_with_it(dtype, kind, cache_type):
    """Alone or in a batch, as a whole, in chunks or token by token, with one thread or two."""
    _, compiled = pair(SMALL, kind, dtype)
    check_that_logits_never_depend_on_the_batch(compiled, cache_type)


def check_that_logits_never_depend_on_the_batch(compiled: NativeTransformer, cache_type: type):
    compiled.new_cache = partial(compiled.new_cache, cache_type=cache_type)
    tokens = ids(64, 560)  # more than the 512 that a pass takes at once
    with torch.inference_mode():
        expected = stepped(compiled, tokens[:1], 560)
        for rows, length in ((2, 560), (16, 530), (64, 90)):
            found = stepped(compiled, tokens[:rows, :length], length)
            assert torch.equal(found[:1], expected[:, :length])
        for prompt, step in ((1, 1), (7, 7), (32, 32), (512, 512), (490, 1)):
            assert torch.equal(stepped(compiled, tokens[:1], prompt, step), expected)
        for threads in (1, 5):  # of more than there are cores, some take what others have left
            torch.set_num_threads(threads)
            try:
                assert torch.equal(stepped(compiled, tokens[:1], 500, 30), expected)
            finally:
                torch.set_num_threads(2)
        if cache_type is KVCache:  # an uncached pass has no 8-bit keys
            assert torch.equal(compiled(tokens[:2])[:1], expected)

        lengths = [550, 5, 77, 513, 1, 30, 222, 9, 64, 65]
        cache, new = compiled.new_cache(10), ids(10, 3, seed=1)
        compiled(tokens[:10], 0, cache)
        cache.truncate(lengths)
        single = []
        for row, length in enumerate(lengths):
            part = cache.part(row, row + 1)
            single.append(compiled(new[row : row + 1], length, part))
        assert torch.equal(compiled(new, lengths, cache), torch.cat(single))


def test_bf16_is_no_further_from_exact_than_the_plain_layers(smollm2_path):
    tokens = ids(1, 200) + 1000
    exact, plain, compiled = (
        Llama.build(smollm2_path, device="cpu", max_batch_size=1, **options).model
        for options in (
            {"dtype": "fp32"},
            {"dtype": "bf16"},
            {"dtype": "bf16", "compile": True},
        )
    )
    with torch.inference_mode():
        expected = exact(tokens).log_softmax(-1)

        def error(logits: torch.Tensor) -> float:
            return (logits.log_softmax(-1) - expected).square().mean().sqrt().item()

        allowed = error(plain(tokens))
        assert error(compiled(tokens)) < 1.05 * allowed
        assert error(stepped(compiled, tokens, 180)) < 1.05 * allowed


@pytest.fixture(scope="module")
def said(smollm2_plain):
    """16 unlike prompts, and what the plain layers make of them: tokens and log-probabilities."""
    step = 10 if THOROUGH else 5
    prompts = [ids(n, seed=n).tolist() for n in range(1, 16 * step, step)]
    return prompts, *smollm2_plain.generate(prompts, 2 * step, temperature=0, logprobs=True)


@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}, {"quantize": "int8"}])
def test_the_real_model_says_the_same(said, smollm2_path, options):
    """Its weights are of 4 and 8 bits already. One prompt, 16 unlike ones, greedy, fp32."""
    compiled = Llama.build(
        smollm2_path, device="cpu", dtype="fp32", max_batch_size=16, compile=True, **options
    )
    prompts, expected, logprobs = said
    new = max(map(len, expected))
    found, compiled_logprobs = compiled.generate(prompts, new, temperature=0, logprobs=True)
    assert found == expected
    for a, b in zip(logprobs, compiled_logprobs, strict=True):
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-3)


# --- quantized files, by default -----------------------------------------------------------------


@pytest.fixture
def file_of(tmp_path, monkeypatch):
    """Writes a small .gguf file whose matrices are of a block type."""
    args = ModelArgs(
        dim=256, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=512, vocab_size=600,
        tied_embeddings=True,
    )  # fmt: skip
    monkeypatch.setitem(shapes.SHAPES, "tiny", args)

    def write(kind: str):
        number = gguf.GGMLQuantizationType[kind]
        monkeypatch.setitem(shapes.KINDS, kind, (number, gguf.LlamaFileType.GUESSED))
        return shapes.write("tiny", kind, tmp_path / f"{kind}.gguf")

    return write


BLOCKS = [kind for kind in kernels.KINDS if kind in ggml.SCALES]


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_file_of_any_block_type_is_computed_as_it_is(file_of, kind, capfd):
    """And means what the gguf package says: 16-bit activations are all that differs."""
    path = file_of(kind)
    default, dense = (
        Llama.build(path, max_seq_len=128, device="cpu", dtype="fp32", **options).model
        for options in ({}, {"compile": False, "quantize": "dense"})
    )
    assert isinstance(default, NativeTransformer) and type(dense) is Transformer
    assert {w.kind for layer in default.layers[0]._packed for w in layer} == {kind}
    assert "as stored blocks and float32" in capfd.readouterr().err
    with torch.inference_mode():
        assert difference(default(ids(2, 40)), dense(ids(2, 40))) < 2e-4


@pytest.mark.parametrize("dtype, cache_type", [("fp32", KVCache), ("bf16", Int8KVCache)])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
@pytest.mark.slow
def test_a_files_blocks_give_the_same_to_the_bit_whatever_is_computed_with_them(
    file_of, kind, dtype, cache_type
):
    llama = Llama.build(file_of(kind), max_seq_len=1024, device="cpu", dtype=dtype)
    check_that_logits_never_depend_on_the_batch(llama.model, cache_type)


def test_what_the_kernels_are_not_for_is_said_and_runs(tmp_path, capfd):
    path = write_checkpoint(tmp_path / "model", TINY)  # heads of 8
    llama = Llama.build(path, max_seq_len=64, device="cpu")
    assert type(llama.model) is Transformer
    [note] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note")]
    assert "several times slower" in note and "head_dim is 8" in note and "compile" not in note


def test_a_quantized_file_with_broken_scales_is_told(file_of):
    path = file_of("Q4_K")
    raw = bytearray(path.read_bytes())
    offset = read_header(path).tensors["blk.1.ffn_up.weight"].offset
    raw[offset : offset + 2] = np.float16("nan").tobytes()
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="feed_forward.w3.weight holds NaN"):
        Llama.build(path, max_seq_len=64, device="cpu")


# --- the int8 cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
def test_an_int8_cache_is_the_plain_layers_int8_cache(dtype, bound):
    """They round the same values; where fp32 puts them on two sides of a half, by one step."""
    eager, compiled = pair(SMALL, dtype=dtype)
    for model in (eager, compiled):
        model.new_cache = partial(model.new_cache, cache_type=Int8KVCache)
    tokens = ids(2, 90)
    expected = stepped(eager, tokens, 60)
    assert difference(stepped(compiled, tokens, 60).float(), expected.float()) < bound


# --- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [{}, {"quantize": "int8"}, {"kv_cache": "int8"}])
def test_ranks_say_what_one_says(tmp_path, build):
    args = replace(SMALL, dim=256, n_heads=8, head_dim=32, hidden_dim=256)
    args = replace(args, tied_embeddings="kv_cache" not in build)
    path = write_checkpoint(tmp_path / "model", args)
    prompts = [[1, 2, 3], [7] * 50, [250, 0, 13, 99, 5]]
    build = {**build, "compile": True, "max_seq_len": 128}
    one, two = (
        run_ranks(n, "generate", tmp_path / f"{n}.json", ckpt=str(path), prompts=prompts,
                  build=build, no_stops=True)
        for n in (1, 2)
    )  # fmt: skip
    assert one["tokens"] == two["tokens"] == two["all_ranks"][1]
    for a, b in zip(one["logprobs"], two["logprobs"], strict=True):
        bound = 2e-2 if "kv_cache" in build else 1e-4
        assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=bound)


# --- compiling -----------------------------------------------------------------------------------


def in_a_process(tmp_path, code: str, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "code.py").write_text(code)
    return subprocess.run(
        [*forked_python(), str(tmp_path / "code.py")], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_compiled_once(tmp_path):
    code = "from llama.backends.cpu import kernels; kernels.add_types(['Q4_K', 'Q6_K'])"
    first, second = (in_a_process(tmp_path, code, CXXFLAGS="-O0") for _ in range(2))
    assert first.returncode == second.returncode == 0
    assert "compiling the CPU kernels for Q4_K, Q6_K (once)" in first.stderr and not second.stderr
    assert len(list(tmp_path.rglob("*.so"))) == 3


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"PATH": "/nowhere", "CXX": ""}, "need a C++ compiler"),
        ({"CXX": "false"}, "can't compile"),
        ({"CXX": "g++-99 -m64"}, "CXX='g++-99 -m64': there is no g++-99"),
        ({"LLAMA_NATIVE": "avx3"}, "LLAMA_NATIVE='avx3': choose one of avx512, avx2, plain"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "can't be kept in /dev/null/llama-reference"),
    ],
)
def test_without_a_compiler_or_a_cache_there_is_a_way_out(tmp_path, environment, message):
    code = (
        "from llama.backends.cpu import kernels\n"
        "try: kernels.library()\n"
        "except ValueError as error: print(error)"
    )
    done = in_a_process(tmp_path, code, **environment)
    assert message in done.stdout, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("fails", ["kernels.cpp", "-DKIND=Q4_K"])
def test_what_cant_be_compiled_leaves_the_plain_layers_before_loading(tmp_path, file_of, fails):
    """By default; asked for, it is an error with the way out."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{fails}*) exit 1;; esac\nexec c++ "$@"')
    compiler.chmod(0o755)
    code = (
        "import sys\n"
        "from llama import Llama\n"
        f"options = dict(max_seq_len=64, device='cpu')\n"
        f"Llama.build({str(file_of('Q4_K'))!r}, **options)\n"
        f"try: Llama.build({str(file_of('Q4_K'))!r}, compile=True, **options)\n"
        "except ValueError as error: print(error)"
    )
    done = in_a_process(tmp_path, code, CXX=str(compiler), CXXFLAGS="-O0")
    [note] = [line for line in done.stderr.splitlines() if line.startswith("note: plain layers")]
    assert "can't compile" in note and "compile=" not in note
    assert done.stdout.startswith("compile=True can't serve here, compile=False can"), done.stderr


def test_a_full_disk_is_no_fault_of_the_compiler(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2; exit 1"
    )
    compiler.chmod(0o755)
    code = "from llama.backends.cpu import kernels; kernels.library()"
    done = in_a_process(tmp_path, code, CXX=str(compiler))
    assert "can't be kept in" in done.stderr and "No space left on device" in done.stderr


def test_the_compiler_may_be_a_command_and_has_options_but_for_the_processor(monkeypatch):
    """Conda sets -march=nocona, which would take this processor's instructions away."""
    monkeypatch.setenv("CXX", "env g++")
    monkeypatch.setenv("CXXFLAGS", "-march=nocona -mtune=haswell -O2 -DNAME='a b' -mcpu=x")
    command = kernels._command.__wrapped__()
    assert command[:2] == ["env", "g++"] and command[-2:] == ["-O2", "-DNAME=a b"]
    assert [word for word in command if word.startswith("-m")] == [kernels._instructions()]


def test_an_arm_processor_is_known_by_its_features(monkeypatch):
    """Libraries for one aren't taken on another that shares a home."""

    def processor(part: str, features: str) -> str:
        text = f"processor : 0\nFeatures : {features}\nCPU implementer : 0x41\nCPU part : {part}\n"
        monkeypatch.setattr(kernels.Path, "read_text", lambda self: text)
        return kernels._processor()

    found = {processor("0xd0c", "asimd"), processor("0xd40", "asimd"), processor("0xd40", "sve")}
    assert len(found) == 3


def test_a_library_may_be_read_by_all_and_is_compiled_again_if_it_is_broken(tmp_path):
    """Other users may share the cache. A name without a slash isn't looked for elsewhere."""
    code = (
        "import os, sys\n"
        "from llama.backends.cpu import kernels\n"
        "os.chdir(sys.argv[0].removesuffix('code.py'))\n"
        "os.umask(0o022)\n"
        "kernels.library()"
    )
    for _ in range(2):
        done = in_a_process(tmp_path, code, CXXFLAGS="-O0", LLAMA_CACHE=".")
        assert done.returncode == 0 and "compiling the CPU kernels" in done.stderr, done.stderr
        [path] = tmp_path.glob("*.so")
        assert path.stat().st_mode & 0o777 == 0o755 and path.stat().st_size > 1000
        path.write_bytes(b"")


def test_a_library_that_cant_be_loaded_leaves_the_plain_layers(tmp_path):
    path, compiler = write_checkpoint(tmp_path / "model", SMALL), tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo > "$last"'
    )
    compiler.chmod(0o755)
    code = f"from llama import Llama; Llama.build({str(path)!r}, max_seq_len=64, device='cpu')"
    done = in_a_process(tmp_path, code, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    [note] = [line for line in done.stderr.splitlines() if line.startswith("note: plain layers")]
    assert "can't be loaded" in note and "LLAMA_CACHE" in note


# How it is compiled, and what is multiplied: whole products are the native ones'. `make soak` does
# what users' processors do.
OTHERS = "-O3" if THOROUGH else "-O0"


@pytest.mark.parametrize("instructions", ["avx512", "avx2", "plain"])
@pytest.mark.slow
def test_other_processors_compute_the_same(tmp_path, instructions):
    """The code that isn't written for AVX-512, on this processor, if it is one that knows it."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests', 'tests/backends', 'tests/engine']\n"
        "import test_adapters, torch\n"
        "from test_native import OTHERS, SIZES, SMALL, check_a_product, difference, ids, kernels\n"
        "from test_native import pair, stepped\n"
        "kernels.SOURCE = kernels.Path('tests/backends/other_processor.cpp')\n"
        "kernels.library().add_all_types()\n"
        "kernels.add_types = lambda kinds: None\n"
        "sizes = ((1, 256), (7, 768), (70, 512)) if OTHERS == '-O0' else SIZES\n"
        "for kind in kernels.KINDS:\n"
        "    for is_bf16 in (False, True):\n"
        "        check_a_product(kind, is_bf16, sizes)\n"
        "for kind in (None, 'int8', 'int4'):\n"
        "    fp32 = 1e-4 if kind else 1e-5\n"
        "    for dtype, bound in ((torch.float32, fp32), (torch.bfloat16, 0.05)):\n"
        "        eager, compiled = pair(SMALL, kind, dtype)\n"
        "        with torch.inference_mode():\n"
        "            found = difference(stepped(compiled, ids(2, 60), 40), eager(ids(2, 60)))\n"
        "        assert found < bound, (kind, dtype, found)\n"
        "test_adapters.test_as_merged_into_the_weights(test_adapters.native.swap, SMALL)\n"
        "test_adapters.test_rows_are_as_alone_on_any_number_of_threads(torch.float32)\n"
    )
    done = in_a_process(tmp_path, code, LLAMA_NATIVE=instructions, CXXFLAGS=OTHERS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args, dtype, message",
    [
        (replace(SMALL, hidden_dim=96 + 16), torch.float32, "hidden_dim of a rank is 112"),
        (TINY, torch.float32, "head_dim is 8"),
        (replace(SMALL, head_dim=288), torch.float32, "head_dim of at most 256"),
        (replace(SMALL, n_heads=80, n_kv_heads=1), torch.float32, "n_kv_heads of at most 64"),
        (SMALL, torch.float16, "dtype torch.float32 or torch.bfloat16, not torch.float16"),
    ],
)
def test_what_the_kernels_are_not_for_is_refused(args, dtype, message):
    model = random_model(args).to(dtype)
    with pytest.raises(ValueError, match=message):
        native.swap(model)


def test_broken_weights_are_still_told(smollm2):
    weights = random_weights(SMALL)
    weights["layers.1.attention.wv.weight"][:] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        model = checkpoint.load(InMemory(SMALL, weights), Transformer(SMALL, device="meta"))
    llama = Llama(native.swap(model), smollm2.tokenizer)
    for prompt in ([1, 2], [3] * 60):
        with pytest.raises(ValueError, match="aren't finite"):
            llama.generate([prompt], 4, temperature=0, stop_tokens=set())


@pytest.mark.parametrize("cache_type", [KVCache, Int8KVCache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [8, 200])
def test_one_token_that_is_no_number_spoils_what_sees_it(length, dtype, cache_type):
    """As with the plain layers: its key's score is NaN, and so is all that is summed up with it."""
    weights = random_weights(SMALL)
    weights["tok_embeddings.weight"][500] = float("nan")
    with pytest.warns(UserWarning, match="NaN"):
        model = Transformer(SMALL, device="meta")
        checkpoint.load(InMemory(SMALL, weights), model, dtype=dtype)
    tokens = ids(1, length)
    tokens[0, 5] = 500
    with torch.inference_mode():
        cache = model.new_cache(1, cache_type=cache_type)
        logits = native.swap(model)(tokens, 0, cache)[0]
    assert logits[5:].isnan().all()


def test_threads_can_share_a_model(smollm2_path):
    llama = Llama.build(smollm2_path, device="cpu", dtype="bf16", compile=True, max_batch_size=4)
    prompts = [ids(n, seed=n).tolist() for n in (5, 40, 9, 120)]
    expected = [llama.generate([p], 12, temperature=0, stop_tokens=set())[0] for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda p: llama.generate([p], 12, temperature=0, stop_tokens=set())[0], prompts
            )
        )
    assert found == expected


def test_buffers_that_grow_leave_those_in_use_alone():
    """A workspace's buffers are shared; other layers' may be replaced by larger ones."""
    _, compiled = pair(SMALL)
    tokens = ids(1, 20)
    with torch.inference_mode():
        expected, work = compiled(tokens), compiled.layers[0]._work
        for name, dtype in (("floats", torch.float32), ("fixed", torch.int32)):
            size = work._buffers[f"x {name}"].numel() if f"x {name}" in work._buffers else 0
            work.take(f"x {name}", 2 * size + 1, dtype)
            others = [torch.full((size,), -1, dtype=dtype) for _ in range(50)]  # where it was
            assert torch.equal(compiled(tokens), expected)
            assert all(bool((other == -1).all()) for other in others)


@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 128), (torch.float32, 64)])
def test_embeddings_of_another_kind_are_refused(dtype, width):
    _, compiled = pair(SMALL)
    with pytest.raises(ValueError, match=f"embeddings of {dtype}, {width} wide, for a model of"):
        compiled(torch.zeros(1, 3, width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_of_another_dtype_are_the_same_ids(dtype):
    _, compiled = pair(SHAPES["tied, odd vocabulary"])
    with torch.inference_mode():
        assert torch.equal(compiled(ids(2, 9).to(dtype)), compiled(ids(2, 9)))


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16])
def test_hidden_states_of_another_kind_are_normed_as_by_the_plain_layers(model_dtype, dtype):
    """Their logits are refused, as there."""
    eager, compiled = pair(SMALL, dtype=model_dtype)
    h = torch.randn(2, 3, SMALL.dim).to(dtype)
    with torch.inference_mode():
        found, expected = compiled.norm(h), eager.norm(h)
        assert found.dtype == expected.dtype and difference(found, expected) < 1e-2
        with pytest.raises(ValueError, match="64 wide, for a layer of"):
            compiled.logits(h[..., :64])
        if dtype != model_dtype:
            with pytest.raises(
                ValueError, match=f"hidden states of {dtype}, 128 wide, for a layer"
            ):
                compiled.logits(h)


def test_a_cache_of_another_dtype_is_refused():
    _, compiled = pair(SMALL)
    cache = KVCache(2, 1, 64, 2, 32, dtype=torch.bfloat16, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="a cache of torch.bfloat16 for a model of torch.float32"):
        compiled(ids(1, 4), 0, cache)


def own_floats(shape: torch.Size, kind: str) -> tuple:
    """Random numbers as blocks of our own types, and what they mean, in fp64."""
    (rows, cols), eights = shape, [code for code in range(256) if code & 127 != 127]  # no NaN
    codes = torch.randint(16, shape).to(torch.uint8)
    scale = torch.rand(rows, cols // floats.VALUES) + 0.5
    each = scale.double().repeat_interleave(floats.VALUES, 1)
    if kind == "FP8":
        codes = torch.tensor(eights)[torch.randint(254, shape)].to(torch.uint8).view(floats.E4M3)
        return Blocks(floats.fp8_blocks(codes, scale), kind), codes.double() * each
    values = floats.CODES[kind].double()[codes.int()] * each
    if kind != "E2M1":
        return Blocks(floats.code_blocks(codes, scale), kind), values
    groups = (torch.rand(rows, cols // floats.GROUP) * 4).to(floats.E4M3)
    values *= groups.double().repeat_interleave(floats.GROUP, 1)
    return Blocks(floats.e2m1_blocks(codes, groups, scale), kind), values


def own_integers(shape: torch.Size, kind: str) -> tuple:
    """Random integers, scales and zero points; and what they mean, in fp64."""
    (rows, cols), (bits, values) = shape, integers.BITS_VALUES[kind]
    q, zero = (torch.randint(1 << bits, (rows, n)) for n in (cols, cols // values))
    scale = torch.rand(rows, cols // values) + 0.5
    dense = (q.view(rows, -1, values) - zero[..., None]).double() * scale.double()[..., None]
    return Blocks(integers.pack(q, scale, zero, kind), kind), dense.view(shape)


def stored_as(weight: torch.Tensor, kind: str) -> tuple:
    """A weight as a file of a block type holds it, and what that means, in fp64."""
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return weight.to(dtype), weight.to(dtype).double()
    if kind in floats.BYTES:
        return own_floats(weight.shape, kind)
    if kind in integers.BYTES:
        return own_integers(weight.shape, kind)
    number = gguf.GGMLQuantizationType[kind]
    try:
        raw = torch.from_numpy(gguf.quantize(weight.numpy(), number))
    except NotImplementedError:  # any bytes are a block, if its scales are numbers of a usual size
        values, size = gguf.GGML_QUANT_SIZES[number]
        raw = torch.randint(256, (len(weight), weight.shape[1] // values, size)).to(torch.uint8)
        for at in ggml.SCALES[kind]:
            raw[..., at : at + 2] = (torch.rand(*raw.shape[:2], 1) * 0.1).half().view(torch.uint8)
        raw = raw.flatten(1)
    return Blocks(raw, kind), torch.from_numpy(gguf.dequantize(raw.numpy(), number)).double()


SIZES = ((1, 256), (7, 768), (130, 2048))


@pytest.mark.parametrize("kind", kernels.KINDS)
@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_product_is_the_exact_one(kind, is_bf16):
    """For any number of rows and columns: to what fp32 sums, or 16-bit activations, can differ."""
    check_a_product(kind, is_bf16, SIZES)


def check_a_product(kind: str, is_bf16: bool, sizes: tuple):
    torch.manual_seed(0)
    work = Workspace(torch.bfloat16 if is_bf16 else torch.float32)
    for rows, cols in sizes:
        stored, dense = stored_as(torch.randn(rows, cols), kind)
        packed = arena_for([stored]).pack(stored)
        taken = packed.take_rows(torch.arange(rows), torch.float32)
        assert ((taken - dense).abs() <= 2e-7 * dense.abs().amax()).all()
        for tokens in (1, 2, 3, 8, 33):
            x = torch.randn(tokens, cols)
            x = x.bfloat16() if is_bf16 else x
            out = torch.empty(tokens, rows)
            inputs, _ = work.inputs("x", tokens, cols, {kind})
            kernels.library().linear(
                is_bf16, byref(packed.struct), kernels.address(x), tokens, kernels.address(out),
                byref(inputs), 2,
            )  # fmt: skip
            exact = F.linear(x.double(), dense)
            if packed.kind in FLOATS:
                size = F.linear(x.double().abs(), dense.abs())
                assert ((out - exact).abs() <= 1e-6 * size).all(), (rows, cols, tokens)
            else:
                size = F.linear(x.double().square(), dense.square())  # of the exact one, on average
                error = ((out - exact).square().mean() / size.mean()).sqrt()
                # Of 32 normal values the largest is about 2.1: steps of 2.1 / 32639, whose
                # rounding is 1.9e-5 of the average value, and more in blocks with an outlier.
                bound = 2.5e-5 if out.numel() > 1000 else 6e-5  # too few for an average
                assert error < bound, (rows, cols, tokens)
