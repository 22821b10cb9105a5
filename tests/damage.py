"""Files that are not checkpoints any more, or never were: each a small lie, written on demand."""

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mto_analysis.masks import MaskRule
from mto_analysis.models import MAE, MAEConfig, ModelInfo

#: Where attacks would write, inside the folder of the damaged files.
TRAP = "written-by-an-attack"

State = dict[str, torch.Tensor]


def whole_state() -> State:
    """A small MAE under the names of the published files."""
    config = MAEConfig(
        image_size=32, patch_size=8, dim=16, depth=2, num_heads=2, mlp_dim=32,
        decoder_dim=8, decoder_depth=1, decoder_num_heads=2, decoder_mlp_dim=16,
    )  # fmt: skip
    info = ModelInfo("mae", "decoder", 32, 8, MaskRule("random", 0.75, 8))
    model = MAE(config, info)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def torch_bytes(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def whole_files() -> dict[str, bytes]:
    """What is damaged: the formats of real checkpoints."""
    state = whole_state()
    training = {"model": state, "epoch": 3, "args": Namespace(lr=0.1, mask_ratio=0.75), "optimizer": {"state": {}}}
    return {
        "published.pth": torch_bytes({"model": state}),
        "trainer.pth": torch_bytes(training),
        "old_format.pth": torch_bytes({"model": state}, _use_new_zipfile_serialization=False),
        "flat.safetensors": save(state),
    }


def whole_folder() -> dict[str, bytes]:
    config = {"num_attention_heads": 2, "decoder_num_attention_heads": 2, "layer_norm_eps": 1e-12, "mask_ratio": 0.75}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(_hugging_face_state())}


def write_damaged(folder: Path, count: int | None = None, names: tuple[str, ...] = ("",)) -> list[Path]:
    """Write damaged checkpoints: all special kinds and 80 random cuts and flips, or some of them, evenly chosen.

    Args:
        folder: Where; ``folder / TRAP`` is what attacks would write.
        count: How many; by default all.
        names: Only files whose name starts with one of these.
    """
    files = [*_special_kinds(folder), *_cuts_and_flips(random.Random(0), 80)]
    files = [file for file in files if file[0].startswith(names)]
    count = count or len(files)
    paths = []
    for index in range(count):
        name, content = files[index * len(files) // count]
        path = folder / f"{index:03d}_{name}"
        if isinstance(content, dict):
            path = path.with_suffix("")
            path.mkdir()
            for inner, data in content.items():
                (path / inner).write_bytes(data)
        else:
            path.write_bytes(content)
        paths.append(path)
    return paths


def _special_kinds(folder: Path) -> Iterator[tuple[str, Any]]:
    yield from _other_content()
    yield from _false_tensors()
    yield from _false_headers()
    yield from _false_archives()
    yield from _attacks(folder / TRAP)
    yield from _exhausting()
    yield from _false_folders()


def _cuts_and_flips(chance: random.Random, count: int) -> list[tuple[str, bytes]]:
    """Half cut somewhere, half with one bit turned where it matters."""
    whole = whole_files()
    made = []
    for index in range(count):
        name = list(whole)[index % len(whole)]
        content = whole[name]
        if index % 2 == index // 4 % 2:
            made.append((f"cut_{name}", content[: chance.randrange(1, len(content) - 1)]))
        else:
            made.append((f"flipped_{name}", _flip(content, _vital(name, content, chance), chance.randrange(8))))
    return made


def _flip(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def _vital(name: str, content: bytes, chance: random.Random) -> int:
    """A place that matters. Weights of formats without checksums are not among them: any number is a number."""
    if name.endswith(".safetensors"):
        return chance.randrange(3)  # the length of the header
    if name.startswith("old"):
        return chance.randrange(2, 14)  # the magic number
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entry = chance.choice([entry for entry in archive.infolist() if "/data" in entry.filename and entry.file_size])
    start = entry.header_offset + 26
    names, extra = struct.unpack("<HH", content[start : start + 4])
    return start + 4 + names + extra + chance.randrange(entry.file_size)


def _other_content() -> Iterator[tuple[str, bytes]]:
    whole = whole_files()["published.pth"]
    for suffix in ("pth", "safetensors", "bin"):
        yield f"empty.{suffix}", b""
        yield f"page.{suffix}", b"<!DOCTYPE html><html><body>Sign in</body></html>"
        yield f"text.{suffix}", b"The weights are on my other computer.\n" * 9
        yield f"lfs.{suffix}", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
        yield f"zeros.{suffix}", bytes(4096)
        yield f"noise.{suffix}", random.Random(1).randbytes(4096)
    yield "json.pth", b'{"model": {"mask_token": [0.0]}}'
    yield "image.pth", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "document.pth", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"
    yield "compressed.pth", gzip.compress(whole)
    yield "byte_order_mark.pth", b"\xef\xbb\xbf<html>"
    yield "pickled.pth", pickle.dumps({"model": {"mask_token": [0.0]}}, protocol=4)
    yield "one_byte.pth", b"P"
    yield "renamed.safetensors", whole[:1000]
    yield "tail.pth", whole[500:]
    yield "twice.pth", whole[:500] + whole[:500]


def _false_tensors() -> Iterator[tuple[str, bytes]]:
    """Files that open, with tensors that no model has."""
    state = whole_state()
    name = "blocks.0.mlp.fc1.weight"
    tensor = state[name]

    def changed(value: object, key: str = name) -> bytes:
        return torch_bytes({"model": {**state, key: value}})

    yield "integers.pth", changed(tensor.to(torch.int64))
    yield "bytes.pth", changed(tensor.to(torch.uint8))
    yield "truths.pth", changed(tensor > 0)
    yield "complex.pth", changed(tensor.to(torch.complex64))
    yield "sparse.pth", changed(tensor.to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "quantized.pth", changed(torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8))
    yield "nowhere.pth", changed(torch.empty(32, 16, device="meta"))
    yield "stride_zero.pth", changed(torch.zeros(1).expand(10**12))
    yield "stride_zero_right_shape.pth", changed(torch.zeros(1, 1).expand(32, 16))
    yield "many_axes.pth", changed(torch.zeros((1,) * 60))
    yield "no_axes.pth", changed(torch.zeros(()))
    yield "no_rows.pth", changed(torch.zeros(0, 16))
    yield "other_shape.pth", changed(torch.zeros(31, 16))
    yield "transposed.pth", changed(tensor.T.contiguous())
    yield "not_a_number.pth", changed(torch.full_like(tensor, torch.nan))
    yield "one_infinite.pth", changed(tensor.clone().index_fill_(0, torch.tensor([3]), torch.inf))
    yield "infinities_that_cancel.pth", changed(torch.stack([torch.full((16,), s * torch.inf) for s in (1, -1)] * 16))
    yield "no_tensor.pth", changed("a text")
    yield "nothing.pth", changed(None)
    yield "list.pth", changed([tensor])
    yield "unknown.pth", changed(tensor, key="blocks.0.extra")
    yield "odd_name.pth", changed(tensor, key="line\nbreak\x1b[31m")
    yield "long_name.pth", changed(tensor, key="x" * 100_000)
    yield "half_a_pair.pth", changed(tensor, key="blocks.\ud800")
    yield "number_as_name.pth", torch_bytes({"model": {**state, 5: tensor}})
    yield "far_block.pth", changed(tensor, key="blocks.9999.mlp.fc1.weight")
    yield "huge_block.pth", changed(tensor, key=f"blocks.{'9' * 50}.mlp.fc1.weight")
    yield "no_square.pth", changed(torch.zeros(1, 18, 16), key="pos_embed")
    yield "no_mask_token.pth", torch_bytes({"model": {k: v for k, v in state.items() if k != "mask_token"}})
    yield "no_positions.pth", torch_bytes({"model": {k: v for k, v in state.items() if "pos_embed" not in k}})
    yield "one_tensor.pth", torch_bytes({"model": {"mask_token": torch.zeros(1, 1, 8)}})
    yield "root_tensor.pth", torch_bytes(tensor)
    yield "root_list.pth", torch_bytes([tensor])
    yield "root_number.pth", torch_bytes(7)
    yield "root_empty.pth", torch_bytes({})
    yield "root_unknown.pth", torch_bytes({"weights": state})
    yield "root_in_root.pth", torch_bytes({"model": {"model": {"model": state}}})
    yield "whole_module.pth", torch_bytes(torch.nn.Linear(2, 2))
    yield "mask_ratio.pth", torch_bytes({"model": state, "args": Namespace(mask_ratio=7.0)})
    yield "mask_ratio_text.pth", torch_bytes({"model": state, "args": Namespace(mask_ratio="much")})
    yield "integers.safetensors", save({**state, name: tensor.to(torch.int32)})
    yield "not_a_number.safetensors", save({**state, name: torch.full_like(tensor, torch.nan)})
    yield "eight_bits.safetensors", save({**state, name: tensor.to(torch.uint8)})
    yield "missing.safetensors", save({k: v for k, v in state.items() if k != "norm.weight"})


def _false_headers() -> Iterator[tuple[str, bytes]]:
    """safetensors: eight bytes of length, a header in JSON, data."""

    def file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def one(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
        return {"mask_token": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}

    yield "long_header.safetensors", file({}, length=2**40)
    yield "longest_header.safetensors", file({}, length=2**64 - 1)
    yield "short_header.safetensors", file(one([1], [0, 4]), bytes(4), length=20)
    yield "huge_shape.safetensors", file(one([2**40], [0, 4]), bytes(4))
    yield "huge_shape_and_offsets.safetensors", file(one([2**40], [0, 2**42]), bytes(4))
    yield "overflowing_shape.safetensors", file(one([2**33, 2**33], [0, 4]), bytes(4))
    yield "backward_offsets.safetensors", file(one([1], [4, 0]), bytes(8))
    yield "negative_offsets.safetensors", file(one([1], [-4, 0]), bytes(8))
    yield "odd_type.safetensors", file(one([1], [0, 4], "F31"), bytes(4))
    yield "small_type.safetensors", file(one([2], [0, 1], "F4"), bytes(1))
    yield "nested_header.safetensors", file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield "list_header.safetensors", file(b"[]")
    yield "odd_metadata.safetensors", file({"__metadata__": {"a": 1}, **one([1], [0, 4])}, bytes(4))
    yield "our_metadata.safetensors", save(whole_state(), {"mto_analysis": '{"version": 1, "family": "mae"}'})
    yield "our_nested_metadata.safetensors", save(whole_state(), {"mto_analysis": "[" * 100_000})
    yield "our_wrong_metadata.safetensors", save(whole_state(), {"mto_analysis": "[1, 2]"})
    yield "our_newer_metadata.safetensors", save(whole_state(), {"mto_analysis": '{"version": 99}'})
    no_data = b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % index for index in range(400_000))
    yield "many_tensors.safetensors", file(b"{" + no_data + b"}")


def _archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _with_pickle(pickled: bytes, **more: bytes) -> bytes:
    """What torch takes for its own archive, with any pickle inside."""
    data = {f"archive/{name.replace('_', '/')}": content for name, content in more.items()}
    return _archive({"archive/data.pkl": pickled, "archive/version": b"3\n", "archive/byteorder": b"little", **data})


def _false_archives() -> Iterator[tuple[str, bytes]]:
    whole = whole_files()["published.pth"]
    yield "no_entries.pth", _archive({})
    yield "other_entries.pth", _archive({"readme.txt": b"hello"})
    yield "nested.pth", _archive({"weights.pth": whole})
    yield "nested_pickle.pth", _archive({"a/data.pkl": _archive({"a/data.pkl": b"\x80\x02}."})})
    yield "bomb.pth", _archive({"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    yield (
        "bomb_of_data.pth",
        _archive({"a/data.pkl": b"\x80\x02}.", "a/version": b"3", "a/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED),
    )
    yield "two_pickles.pth", _archive({"a/data.pkl": b"\x80\x02}.", "b/data.pkl": b"\x80\x02}."})
    yield "script.pth", _archive({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b"\x80\x02).", "a/code/x.py": b""})
    yield "path.pth", _archive({"../../data.pkl": b"\x80\x02}."})
    # The central directory, at the end, is what readers go by: declare 2^31 bytes of an entry.
    end = whole.rindex(b"PK\x01\x02")
    yield "declared_huge.pth", whole[: end + 20] + struct.pack("<II", 2**31, 2**31) + whole[end + 28 :]
    yield "declared_elsewhere.pth", whole[: end + 42] + struct.pack("<I", 2**31) + whole[end + 46 :]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"\x80\x02}."))
    yield "tape.pth", buffer.getvalue()
    yield "huge_storage.pth", _with_pickle(_tensor_pickle(2**40, 2**40), data_0=bytes(16))
    yield "huge_view.pth", _with_pickle(_tensor_pickle(4, 2**33), data_0=bytes(16))
    yield "negative_view.pth", _with_pickle(_tensor_pickle(4, -4), data_0=bytes(16))
    yield "no_storage.pth", _with_pickle(_tensor_pickle(4, 4))
    yield "old_huge_storage.pth", _old_format(_tensor_pickle(2**40, 2**40, view=True))


def _tensor_pickle(storage: int, numel: int, *, view: bool = False) -> bytes:
    """``{"model": {"mask_token": tensor}}`` with a declared storage and a declared size."""

    def number(value: int) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    kept = b"N" if view else b""
    identity = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    rest = b"K\x00" + number(numel) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"  # offset, size, stride ...
    return (
        b"\x80\x02}X\x05\x00\x00\x00model}X\x0a\x00\x00\x00mask_token"
        + (b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + number(storage) + kept + b"tQ" + rest + b"tR")
        + b"ss."
    )


def _old_format(pickled: bytes) -> bytes:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    about = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, protocol=2)
    return magic + b"\x80\x02M\xe9\x03." + about + pickled + pickle.dumps(["0"], protocol=2) + bytes(8)


class _Call:
    """Pickled as a call, which an ordinary unpickler would make."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _called(name: str, *arguments: object) -> bytes:
    """The pickle of a call by name, for what this Python has not or would rename."""
    module, function = name.rsplit(".", 1)
    return f"\x80\x02c{module}\n{function}\n".encode("latin1") + pickle.dumps(arguments, protocol=2)[2:-1] + b"R."


def _attacks(trap: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that would write the trap file if their calls were made."""
    import builtins
    import os
    import subprocess

    shell, code = f"echo trapped > '{trap}'", f"open({str(trap)!r}, 'w').write('trapped')"
    state = whole_state()
    calls = {
        "system": _Call(os.system, shell),
        "eval": _Call(eval, code),
        "exec": _Call(builtins.exec, code),
        "open": _Call(open, str(trap), "w"),
        "popen": _Call(subprocess.Popen, ["sh", "-c", shell]),
        "getattr": _Call(getattr, Path(trap), "touch"),
        "import": _Call(builtins.__import__, "antigravity"),
    }
    for name, call in calls.items():
        yield f"attack_{name}.pth", torch_bytes({"model": state, "args": call})
        yield f"attack_{name}_in_weights.pth", torch_bytes({"model": {**state, "mask_token": call}})
        yield f"attack_{name}_newer.pth", torch_bytes({"model": state, "args": call}, pickle_protocol=4)
        yield f"attack_{name}_bare.pth", pickle.dumps(call)
        old = torch_bytes({"model": state, "args": call}, _use_new_zipfile_serialization=False)
        yield f"attack_{name}_old.pth", old
    for name in ("posix.system", "os.system", "commands.getoutput", "nt.system", "__builtin__.execfile", "pty.spawn"):
        yield f"attack_{name}.pth", _with_pickle(_called(name, shell))
        yield f"attack_{name}_old.pth", _old_format(_called(name, shell))
    yield "attack_builtin_eval.pth", _with_pickle(_called("__builtin__.eval", code))
    yield "attack_runpy.pth", _with_pickle(_called("runpy._run_code", code, {}))
    yield "attack_torch_load.pth", _with_pickle(_called("torch.serialization.load", str(trap)))
    yield "attack_hub.pth", _with_pickle(_called("torch.hub.load", "owner/name", "model"))
    yield "attack_numpy.pth", _with_pickle(_called("numpy.testing._private.utils.runstring", code, {}))
    yield "attack_build.pth", _with_pickle(b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00a\x4b\x01sb.")


def _exhausting() -> Iterator[tuple[str, bytes]]:
    """Pickles that fill the memory or the stack of a reader that only makes harmless calls."""
    yield "deep_list.pth", _with_pickle(b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".")
    yield "deep_tuple.pth", _with_pickle(b"\x80\x02)" + b"\x85" * 900_000 + b".")
    yield "deep_key.pth", _with_pickle(b"\x80\x02})" + b"\x85" * 900_000 + b"K\x01s.")
    yield "deep_dict.pth", _with_pickle(b"\x80\x02" + b"}K\x00" * 200_000 + b"}" + b"s" * 200_000 + b".")
    yield "many_lists.pth", _with_pickle(b"\x80\x02" + b"]" * 20_000_000 + b".")
    yield "no_end.pth", _with_pickle(b"\x80\x02" + b"]0" * 2_000_000)
    yield "big_memo.pth", _with_pickle(b"\x80\x02}r\xff\xff\xff\x7f.")
    yield "bytearray.pth", _with_pickle(_called("__builtin__.bytearray", 2**33))
    yield "huge_tensor.pth", _with_pickle(_called("torch.FloatTensor", 2**33))
    text = b"\x80\x02c_codecs\nencode\nq\x00X\x04\x00\x00\x00aaaaX\x06\x00\x00\x00latin1\x86R"
    doubled = b"X\x03\x00\x00\x00hexq\x02" + b"q\x030h\x00h\x03h\x02\x86R" * 40
    yield "doubling_text.pth", _with_pickle(text + doubled + b".")
    size = b"ctorch\nSize\nq\x01((" + b"K\x00" * 100_000 + b"tq\x02\x85q\x03h\x01h\x03R"
    yield "copied_tuple.pth", _with_pickle(b"\x80\x02" + size + b"h\x01h\x03R" * 100_000 + b"t.")
    loop = b"}q\x00(" + b"".join(b"K" + bytes([index]) + b"h\x00" for index in range(100)) + b"u"
    yield (
        "loop.pth",
        _with_pickle(_tensor_pickle(4, 4)[:-1] + b"X\x04\x00\x00\x00args" + loop + b"s.", data_0=bytes(16)),
    )
    yield "long_number.pth", _with_pickle(b"\x80\x02\x8b" + struct.pack("<I", 10**6) + bytes(10**6 - 1) + b"\x01.")
    yield "declared_text.pth", _with_pickle(b"\x80\x02X" + struct.pack("<I", 2**31) + b"short.")
    yield "declared_bytes.pth", _with_pickle(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"short.")


def _false_folders() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Hugging Face folders whose settings lie."""
    weights, true = whole_folder()["model.safetensors"], json.loads(whole_folder()["config.json"])
    lies: dict[str, object] = {
        "num_attention_heads": 7,
        "decoder_num_attention_heads": 10**30,
        "layer_norm_eps": "small",
        "mask_ratio": 3,
    }
    for name, lie in lies.items():
        yield f"lie_{name}", {"config.json": json.dumps({**true, name: lie}).encode(), "model.safetensors": weights}
    yield "config_list", {"config.json": b"[]", "model.safetensors": weights}
    yield "config_nested", {"config.json": b'{"a":' * 100_000, "model.safetensors": weights}
    yield "config_binary", {"config.json": bytes(range(256)), "model.safetensors": weights}
    yield "config_number", {"config.json": b'{"mask_ratio": ' + b"9" * 10_000 + b"}", "model.safetensors": weights}
    yield "config_absent", {"model.safetensors": weights}
    yield "weights_absent", {"config.json": json.dumps(true).encode()}
    lists = {"absent": {"a": "b"}, "outside": {"a": "../../etc/passwd"}, "list": [1], "number": {"a": 1}}
    for name, shards in (lists | {"itself": {"a": "model.safetensors.index.json"}}).items():
        index = json.dumps({"weight_map": shards}).encode()
        yield f"index_{name}", {"model.safetensors.index.json": index, "config.json": b"{}"}


def _hugging_face_state() -> State:
    """The same model under the names of a Hugging Face folder."""
    renamed: State = {}
    for name, value in whole_state().items():
        new = name.replace("blocks.", "layer.").replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        new = new.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        new = new.replace("attn.proj", "attention.output.dense").replace("decoder_layer.", "decoder_layers.")
        new = new.replace("patch_embed.proj", "patch_embeddings.projection")
        if name.startswith(("decoder_", "mask_token")):
            new = f"decoder.{new}"
        elif name.startswith("blocks."):
            new = f"vit.encoder.{new}"
        elif name.startswith("norm."):
            new = f"vit.layer{new}"
        else:
            new = f"vit.embeddings.{'position_embeddings' if name == 'pos_embed' else new}"
        if ".attn.qkv." in new:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[new.replace("attn.qkv", f"attention.attention.{part}")] = chunk.clone()
        else:
            renamed[new] = value
    return renamed
