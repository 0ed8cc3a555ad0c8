"""Llama 3.2 Vision against Meta's own code: its encoder, and text that reads images."""

import sys
from types import ModuleType

import pytest
import torch
from conftest import random_model, random_weights
from vision import GRIDS, IMAGE, ROWS, TINY_VISION, image, images_of

from llama.families.vision import views
from llama.families.vision_encoder import VisionArgs
from llama.layers.paged import PAGE, PagedRows

TOLERANCE = 1e-4


def gap(ours, theirs):
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def model():
    return random_model(TINY_VISION)


@pytest.fixture(scope="module")
def metas():
    """Meta's network with the same weights: its encoder's numbers, which are constants, made ours.

    torchvision, which it imports for its transforms, isn't needed for the network.
    """
    fake, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    fake.transforms, transforms.functional = transforms, None
    with pytest.MonkeyPatch.context() as patch:
        for module in (fake, transforms):
            patch.setitem(sys.modules, module.__name__, module)
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.multimodal import model as meta

    args = TINY_VISION

    class Vision(meta.CrossAttentionTransformerVision):
        def __init__(self, _):
            torch.nn.Module.__init__(self)
            self.patch_size, self.image_res = args.vision_patch_size, args.vision_chunk_size
            self.vision_encoder = meta.VisionEncoder(
                max_num_tiles=args.vision_max_num_chunks, image_size=args.vision_chunk_size,
                patch_size=args.vision_patch_size, width=args.vision_width,
                layers=args.vision_layers, heads=args.vision_heads, global_model=True,
                n_global_layers=args.vision_global_layers,
                return_intermediate=list(args.vision_features),
            )  # fmt: skip
            width = args.vision_width * (1 + len(args.vision_features))
            self.vision_projection = meta.ColumnParallelLinear(width, args.dim, bias=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta, "CrossAttentionTransformerVision", Vision)
        # Images come as tiles already.
        patch.setattr(meta, "VariableSizeImageTransform", lambda size: lambda tiles, **_: tiles)
        same = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
                "use_scaled_rope", "max_seq_len", "vision_chunk_size", "vision_max_num_chunks",
                "vision_num_cross_attention_layers")  # fmt: skip
        shape = ModelArgs(**{name: getattr(args, name) for name in same})
        network = meta.CrossAttentionTransformer(shape)
    weights = random_weights(args)
    network.load_state_dict(
        {name if name.startswith("vision_model") else f"text_model.{name}": weight
         for name, weight in weights.items()}
    )  # fmt: skip
    network.setup_cache(len(ROWS), torch.device("cpu"), torch.float32)
    return network


def metas_logits(network, rows, images):
    from llama_models.llama3.chat_format import create_vision_mask

    masks = [create_vision_mask(row, IMAGE) for row in rows]
    caches, cross_masks, full_masks = network.compute_vision_tokens_masks(
        images, masks, len(rows[0]), torch.device("cpu")
    )
    positions = torch.arange(len(rows[0]))
    tokens = torch.tensor(rows)
    return network(positions, tokens, cross_masks, full_masks, caches)


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_metas(model, metas, grid):
    tiles, _ = image(grid)
    padded = torch.zeros(1, 1, 4, *tiles.shape[1:])
    padded[0, 0, : len(tiles)] = tiles
    expected = metas.vision_model(padded, torch.tensor([[grid]]))[0, 0, : len(tiles)]
    assert gap(model.vision_model(tiles, grid), expected) < TOLERANCE


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_metas(model, metas, seed):
    images = images_of(ROWS, seed)
    ours = model(torch.tensor(ROWS), images=[[model.encode(*one) for one in r] for r in images])
    assert gap(ours, metas_logits(metas, ROWS, images)) < TOLERANCE


@torch.inference_mode()
def test_images_matter_from_their_token_on(model):
    """Another image changes what follows it, up to the next, and nothing before."""
    row = ROWS[1]
    one, other = ([model.encode(*i) for i in images_of([row], seed)[0]] for seed in (0, 1))
    tokens = torch.tensor([row])
    whole = model(tokens, images=[one])
    last = model(tokens, images=[[*one[:2], other[2]]])
    assert torch.equal(whole[:, :4], last[:, :4]) and gap(whole[:, 4], last[:, 4]) > 0.01
    text = model(torch.tensor([ROWS[2]]))
    assert torch.equal(text, model(torch.tensor([ROWS[2]]), images=[[]]))


def rows_of_cache(model, rows, encoded):
    """A cache that continues nothing yet, one block for each row."""
    pool = model.new_cache(1 + len(rows), PAGE)
    seen = [
        views([i for i, token in enumerate(row) if token == IMAGE], of_row)
        for row, of_row in zip(rows, encoded, strict=True)
    ]
    tables = [[1 + i] for i in range(len(rows))]
    return PagedRows(pool, tables, [0] * len(rows), images=seen)


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[11], [4, 7], [1] * 11, [5, 1, 3, 2]])
def test_cached_and_chunked_is_whole(model, chunks):
    encoded = [[model.encode(*one) for one in row] for row in images_of(ROWS)]
    expected = model(torch.tensor(ROWS), images=encoded)
    cache, start, found = rows_of_cache(model, ROWS, encoded), 0, []
    for n in chunks:
        tokens = torch.tensor(ROWS)[:, start : start + n]
        found.append(model(tokens, start, cache))
        start += n
    assert gap(torch.cat(found, 1), expected) < TOLERANCE


@torch.inference_mode()
def test_batch_is_single(model):
    encoded = [[model.encode(*one) for one in row] for row in images_of(ROWS)]
    whole = model(torch.tensor(ROWS), images=encoded)
    for i, row in enumerate(ROWS):
        assert gap(model(torch.tensor([row]), images=[encoded[i]])[0], whole[i]) < TOLERANCE


@torch.inference_mode()
def test_embeddings_are_taken_in_place_of_ids(model):
    tokens = torch.tensor([ROWS[2]])
    assert torch.equal(model(model.embed(tokens)), model(tokens))


def test_gradients_reach_the_encoder(model):
    trained = random_model(TINY_VISION)
    row = ROWS[1]
    encoded = [trained.encode(*one) for one in images_of([row])[0]]
    trained(torch.tensor([row]), images=[encoded]).square().mean().backward()
    unused = {name for name, p in trained.named_parameters() if p.grad is None}
    assert not unused


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(vision_chunk_size=50), "vision_chunk_size=50 isn't a multiple"),
        (dict(vision_heads=3), "vision_width=32 isn't a multiple of vision_heads=3"),
        (dict(vision_num_cross_attention_layers=3), "can't be spread evenly"),
        (dict(vision_features=(3, 5)), "each less than vision_layers=5"),
        (dict(vision_features="3"), "whole numbers"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VisionArgs(**{**vars(TINY_VISION), **fields})


def test_images_and_their_tokens_are_counted(model):
    with pytest.raises(ValueError, match="0 images, and 1 tokens for them"):
        model(torch.tensor([ROWS[0]]), images=[[]])
    with pytest.raises(ValueError, match="521"):
        model(torch.tensor([[521]]))
