import pytest
import torch

from mto_analysis.affinity import TokenSplit
from mto_analysis.mto import MTOConfig, mto_loss
from mto_analysis.probe import undisturbed
from mto_analysis.runtime import precision as products
from mto_analysis.runtime.precision import fast_float32, full_float32

NEW_WORDS = pytest.mark.skipif(products._MATMUL is None, reason="torch has no word for the precision of products")
MASK = torch.tensor([[True, True, False, False]])


@pytest.fixture(autouse=True)
def _settings_restored():
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    word = None if products._MATMUL is None else cpu_word()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
    if word is not None:
        products._MATMUL.fp32_precision = word


def cpu_word():
    return products._MATMUL.fp32_precision


def lacks_the_last_bits(kept):
    """A product whose operands are rounded to so many bits, as a processor with a fast instruction would do."""

    def rounded(x):
        return (x.view(torch.int32) & (-1 << (24 - kept))).view(torch.float32)

    return lambda left, right: torch.matmul(rounded(left.contiguous()), rounded(right.contiguous()))


@pytest.fixture(params=[True, False], ids=["exact", "rounds"])
def exact(request, monkeypatch):
    monkeypatch.setattr(products, "_keeps_float32", lambda: request.param)
    return request.param


@NEW_WORDS
def test_fast_float32__allows_the_other_library_only_where_it_is_exact(exact):
    before = cpu_word()
    with fast_float32():
        assert cpu_word() == ("bf16" if exact else before)
        with fast_float32("cpu"):
            assert cpu_word() == ("bf16" if exact else before)
        assert cpu_word() == ("bf16" if exact else before)
    assert cpu_word() == before


@NEW_WORDS
def test_fast_float32__is_undone_after_an_error():
    before = cpu_word()
    with pytest.raises(KeyError), fast_float32():
        raise KeyError
    assert cpu_word() == before


@NEW_WORDS
@pytest.mark.parametrize("chosen", ["tf32", "bf16"])
def test_fast_float32__leaves_a_chosen_precision(exact, chosen):
    products._MATMUL.fp32_precision = chosen
    with fast_float32():
        assert cpu_word() == chosen
    assert cpu_word() == chosen


@NEW_WORDS
def test_fast_float32__does_nothing_for_other_devices(exact):
    before = cpu_word()
    with fast_float32("cuda"), fast_float32("mps"):
        assert cpu_word() == before


@NEW_WORDS
@pytest.mark.parametrize("chosen", ["none", "tf32", "bf16"])
def test_full_float32__overrules_a_chosen_precision(exact, chosen):
    products._MATMUL.fp32_precision = chosen
    with full_float32():
        assert cpu_word() == ("bf16" if exact else "ieee")
    assert cpu_word() == chosen


@NEW_WORDS
def test_full_float32__leaves_the_cpu_alone_where_tensors_are_elsewhere(exact):
    before = cpu_word()
    with full_float32("cuda"):
        assert cpu_word() == before
        assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_precision__does_without_the_word_of_newer_versions_of_torch(monkeypatch, device_type):
    monkeypatch.setattr(products, "_MATMUL", None)
    monkeypatch.setattr(products, "_keeps_float32", lambda: pytest.fail("nothing is to be tried"))
    with fast_float32(device_type), full_float32(device_type):
        assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_full_float32__has_no_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    with full_float32():
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed


@NEW_WORDS
def test_full_float32__also_where_the_newer_words_were_used():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with undisturbed(torch.nn.Linear(2, 2)):
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"


def test_products__do_without_the_word_of_newer_versions(monkeypatch):
    monkeypatch.setattr(products, "_MATMUL", None)
    with fast_float32(), full_float32():
        assert torch.equal(torch.ones(2, 3) @ torch.ones(3, 2), torch.full((2, 2), 3.0))


@pytest.mark.parametrize("kept", [8, 11, 16], ids=["bf16", "tf32", "two bf16"])
@pytest.mark.parametrize("shape", products._TRIED)
def test_trial__notices_rounded_operands(shape, kept, monkeypatch):
    assert products._counts_exactly(*shape)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lacks_the_last_bits(kept))
    assert not products._counts_exactly(*shape)


@NEW_WORDS
def test_trial__is_the_same_inside_autocast_and_leaves_no_trace():
    products._keeps_float32.cache_clear()
    before, outside = cpu_word(), products._keeps_float32()
    products._keeps_float32.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert products._keeps_float32() is outside
        assert not torch.backends.mkldnn.enabled
    assert cpu_word() == before


@pytest.mark.parametrize("shape", [(3, 5, 7, 11), (8, 76, 120, 384), (2, 196, 196, 768)])
def test_fast_float32__is_as_near_as_float32_can_be(shape):
    batch, rows, columns, inner = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(batch, rows, inner, generator=generator)
    right = torch.randn(batch, columns, inner, generator=generator)
    exact = left.double() @ right.double().mT
    with fast_float32():
        error = (left @ right.mT - exact).abs().max() / exact.abs().max()
    assert error < 2e-6  # operands rounded to bf16 would be off by some 1e-3


@NEW_WORDS
def test_measures_and_losses__leave_the_setting_as_it_was():
    before = cpu_word()
    tokens = torch.randn(1, 4, 8, requires_grad=True)
    mto_loss([tokens, tokens * 0.5], MASK, MTOConfig()).loss.backward()
    with pytest.raises(RuntimeError):
        TokenSplit(MASK).map(tokens, lambda x, num_masked: x @ x)
    assert cpu_word() == before
