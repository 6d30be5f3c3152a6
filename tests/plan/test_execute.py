import errno
import json
import os
from io import FileIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import assert_same, oracle, plans, random_tensors, schemas
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gearshift.plan import (
    Cast,
    Concatenate,
    Discard,
    Initialise,
    Normal,
    Permute,
    Plan,
    Reference,
    Repeat,
    Reshape,
    Slice,
    TensorInfo,
    infer,
    shards,
)
from gearshift.plan.execute import PROGRESS_FILE, MappingSource, evaluate, execute, materialise
from gearshift.plan.sources import Extent, count_nonfinite

LAYERS = 6
SHARD_BYTES = 500


class FileSource:
    """A safetensors file read lazily; it counts reads, and fails when it comes to one tensor."""

    def __init__(self, path, fails_at=None):
        self._path, self._fails_at = path, fails_at
        self.reads = []
        with safe_open(path, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self.schema = {name: TensorInfo(tuple(view.get_shape()), "float32") for name, view in views.items()}

    def read(self, name, box=None):
        if name == self._fails_at:
            raise KeyboardInterrupt
        self.reads.append((name, box))
        with safe_open(self._path, "pt") as file:
            if box is None:
                return file.get_tensor(name)
            return file.get_slice(name)[tuple(slice(*interval) for interval in box)]


@pytest.fixture
def tensors():
    return random_tensors({f"layers.{layer}.k": TensorInfo((8, 6), "float32") for layer in range(LAYERS)})


@pytest.fixture
def source(tmp_path, tensors):
    save_file(tensors, tmp_path / "source.safetensors")
    return FileSource(tmp_path / "source.safetensors")


def plan_of(source, expressions):
    return Plan(source, {name: infer(e, source) for name, e in expressions.items()}, expressions)


@pytest.fixture
def plan(source):
    expressions = {}
    for layer in range(LAYERS):
        k = Reference(f"layers.{layer}.k")
        expressions |= {
            f"blocks.{layer}.k": k,
            f"blocks.{layer}.tiled": Repeat(Slice(k, 0, 0, 4), 0, 2),
            f"blocks.{layer}.joined": Permute(Concatenate((k, Cast(Cast(k, "float64"), "float32")), 1), (1, 0)),
            f"blocks.{layer}.half": Cast(k, "bfloat16"),
            f"blocks.{layer}.new": Initialise(Normal(0.02), (3,), "float32"),
        }
    return plan_of(source.schema, expressions)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def loaded(folder, target):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: tensors[name] for name in target}


def test_one_file_holds_what_materialise_gives(plan, source, tmp_path):
    execute(plan, source, tmp_path / "out", seed=4, metadata={"made_by": "a test"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(loaded(tmp_path / "out", plan.target), materialise(plan, source, seed=4))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}


def test_shards_follow_the_schema_and_have_an_index(plan, source, tmp_path):
    execute(plan, source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == list(plan.target)
    assert index["metadata"]["total_size"] == sum(info.bytes for info in plan.target.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert set(held) == {name for name, where in index["weight_map"].items() if where == file}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= SHARD_BYTES
    assert_same(loaded(tmp_path / "out", plan.target), materialise(plan, source))


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    source = MappingSource(
        {"flag": torch.ones(3, dtype=torch.bool), "x": torch.ones(2).double(), "h": torch.ones(1).half()}
    )
    execute(plan_of(source.schema, {name: Reference(name) for name in source.schema}), source, tmp_path)
    blob = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + size])
    assert (8 + size) % 8 == 0
    assert [entries[name]["data_offsets"][0] for name in ("x", "h", "flag")] == [0, 16, 18]


def test_all_dtypes_survive(tmp_path):
    dtypes = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
    tensors = {dtype: torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, dtype)) for dtype in dtypes}
    tensors |= {dtype: torch.ones(2).to(getattr(torch, dtype)) for dtype in ("float8_e4m3fn", "float8_e5m2")}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    source = MappingSource(tensors)
    execute(plan_of(source.schema, {name: Reference(name) for name in tensors}), source, tmp_path)
    assert_same(loaded(tmp_path, tensors), tensors)


def test_the_same_input_gives_the_same_bytes(plan, source, tmp_path):
    for name in ("first", "second"):
        execute(plan, source, tmp_path / name, shard_bytes=SHARD_BYTES, seed=1)
    execute(plan, source, tmp_path / "first", shard_bytes=SHARD_BYTES, seed=1)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_progress_adds_up_to_the_target(plan, source, tmp_path):
    done = []
    execute(plan, source, tmp_path / "out", shard_bytes=SHARD_BYTES, progress=done.append)
    assert sum(done) == sum(info.bytes for info in plan.target.values())


@pytest.mark.parametrize("fails_at", [f"layers.{layer}.k" for layer in range(LAYERS)])
def test_a_killed_run_resumes_to_the_same_bytes(plan, source, tmp_path, fails_at):
    execute(plan, source, tmp_path / "unbroken", shard_bytes=SHARD_BYTES, fingerprint="abc")
    out = tmp_path / "out"
    failing = FileSource(tmp_path / "source.safetensors", fails_at)
    with pytest.raises(KeyboardInterrupt):
        execute(plan, failing, out, shard_bytes=SHARD_BYTES, fingerprint="abc")
    assert not list(out.glob("*.partial"))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    for path in (tmp_path / "unbroken").glob("*.safetensors"):
        if out / path.name not in finished:
            (out / f"{path.name}.partial").write_bytes(b"what a run that could not clean up leaves")
    done = []
    execute(plan, source, out, shard_bytes=SHARD_BYTES, fingerprint="abc", progress=done.append)
    assert contents(out) == contents(tmp_path / "unbroken")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert sum(done) == sum(info.bytes for info in plan.target.values())


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"fingerprint": "other"}, {"shard_bytes": 700}, {"metadata": {"a": "b"}}]
)
def test_stale_progress_is_discarded(plan, source, tmp_path, change):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        execute(plan, FileSource(tmp_path / "source.safetensors", "layers.3.k"), out, shard_bytes=SHARD_BYTES)
    arguments = {"shard_bytes": SHARD_BYTES} | change
    execute(plan, source, out, **arguments)
    execute(plan, source, tmp_path / "fresh", **arguments)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_truncated_shard_and_a_damaged_record_are_not_trusted(plan, source, tmp_path):
    out = tmp_path / "out"
    execute(plan, source, tmp_path / "fresh", shard_bytes=SHARD_BYTES)
    for damage in ("model-00001-of-", PROGRESS_FILE):
        with pytest.raises(KeyboardInterrupt):
            execute(plan, FileSource(tmp_path / "source.safetensors", "layers.3.k"), out, shard_bytes=SHARD_BYTES)
        for path in out.glob(damage + "*"):
            path.write_bytes(path.read_bytes()[:-1])
        execute(plan, source, out, shard_bytes=SHARD_BYTES)
        assert contents(out) == contents(tmp_path / "fresh")


def test_a_full_disk_goes_on_as_it_is_and_leaves_no_broken_file(plan, source, tmp_path):
    def full(count):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        execute(plan, source, tmp_path / "out", progress=full)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PROGRESS_FILE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named_and_counted(tmp_path, dtype, value):
    tensor = torch.ones(50)
    tensor[[7, 9]] = value
    source = MappingSource({"good": torch.ones(3), "bad": tensor.to(dtype)})
    plan = plan_of(source.schema, {name: Reference(name) for name in source.schema})
    with pytest.raises(ValueError, match="source tensor 'bad' holds 2 non-finite values among 50"):
        execute(plan, source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))
    with pytest.raises(ValueError, match="'bad'"):
        materialise(plan, source)


def test_large_finite_values_pass(tmp_path):
    source = MappingSource({"w": torch.full((1000,), 60_000.0).half(), "x": torch.full((10,), 3e38)})
    execute(plan_of(source.schema, {name: Reference(name) for name in source.schema}), source, tmp_path)
    assert_same(loaded(tmp_path, source.schema), {name: source.read(name) for name in source.schema})


def test_a_cast_that_overflows_is_refused():
    source = MappingSource({"w": torch.tensor([1.0, 1e6])})
    plan = plan_of(source.schema, {"w": Cast(Reference("w"), "float16")})
    with pytest.raises(ValueError, match="target 'w': 1 of 2 values are too large for float16"):
        materialise(plan, source)


def test_another_source_than_the_plans_is_refused(plan, tmp_path):
    with pytest.raises(ValueError, match=r"of the plan and the source the latter lacks 'layers\.0\.k'"):
        execute(plan, MappingSource({}), tmp_path)
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        execute(Plan({}, {}, {}), MappingSource({}), tmp_path, shard_bytes=0)


def test_a_tensor_is_read_once_and_a_slice_reads_its_region_only(plan, source, tmp_path):
    execute(plan, source, tmp_path / "out")
    assert sorted(source.reads, key=str) == sorted(
        [(name, box) for name in source.schema for box in (None, ((0, 4), (0, 6)))], key=str
    )


def test_what_does_not_fit_is_read_again(plan, source, tmp_path):
    execute(plan, source, tmp_path / "out", shard_bytes=100)
    assert source.reads.count(("layers.0.k", None)) == 4
    assert_same(loaded(tmp_path / "out", plan.target), materialise(plan, source))


def test_a_region_of_slices_of_slices():
    tensor = torch.arange(24.0).reshape(4, 6)
    expression = Slice(Reshape(Slice(Slice(Reference("w"), 0, 1, 4), 1, 2, 4), (6,)), 0, 1, 5)
    assert evaluate(expression, MappingSource({"w": tensor}), 0, "t").tolist() == [9.0, 14.0, 15.0, 20.0]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_evaluation_agrees_with_the_oracle(data):
    plan = data.draw(schemas().flatmap(plans))
    tensors = random_tensors(plan.source)
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    for name, tensor in materialise(plan, MappingSource(tensors)).items():
        expected = torch.from_numpy(oracle(plan.expressions[name], arrays).copy())
        # The test's values are eighths below 13, which every dtype here holds exactly.
        assert torch.equal(tensor.double(), expected)


class CopiedSource:
    """The bytes of a file as tensors that lie in it, which can be copied; it counts what is asked to be."""

    def __init__(self, path, tensors):
        self._tensors, self._extents, self.asked = tensors, {}, []
        self.schema = MappingSource(tensors).schema
        with path.open("wb") as file:
            file.write(b"odd")
            for name, tensor in tensors.items():
                data = tensor.numpy().tobytes()
                self._extents[name] = Extent(path, file.tell(), len(data))
                file.write(data)

    def read(self, name, box=None):
        return MappingSource(self._tensors).read(name, box)

    def extent(self, name, box=None):
        self.asked.append((name, box))
        return self._extents[name] if box is None else None


class TestCopies:
    @pytest.fixture
    def tensors(self):
        shapes = {"a": (300, 70), "b": (7,), "none": (0, 4), "wide": (50, 1000)}
        return random_tensors({name: TensorInfo(shape, "float32") for name, shape in shapes.items()})

    @pytest.fixture
    def plan(self, tensors):
        schema = MappingSource(tensors).schema
        expressions = {f"new.{name}": Reference(name) for name in tensors}
        expressions |= {"rows": Slice(Reference("a"), 0, 0, 7), "turned": Permute(Reference("a"), (1, 0))}
        return plan_of(schema, expressions)

    def test_tensors_that_pass_as_they_are_are_copied_from_file_to_file(self, plan, tensors, tmp_path, monkeypatch):
        source = CopiedSource(tmp_path / "data", tensors)
        execute(plan, MappingSource(tensors), tmp_path / "written")
        written = []
        monkeypatch.setattr(shards, "_write_all", lambda file, data: written.append(file.write(data)))
        execute(plan, source, tmp_path / "copied")
        assert contents(tmp_path / "copied") == contents(tmp_path / "written")
        assert sorted(source.asked, key=str) == sorted(
            [*((name, None) for name in tensors), ("a", ((0, 7), (0, 70)))], key=str
        )
        assert written[1:] == [7 * 70 * 4, 300 * 70 * 4]

    @pytest.mark.parametrize("done", [0, 4, 8000])
    def test_where_the_system_cannot_copy_the_rest_is_written(self, plan, tensors, tmp_path, monkeypatch, done):
        real = os.copy_file_range

        def partly(source, target, count, offset_src):
            if offset_src > 3 + done:
                raise OSError(errno.EXDEV, "another device")
            return real(source, target, min(count, 4000), offset_src=offset_src)

        execute(plan, MappingSource(tensors), tmp_path / "written")
        monkeypatch.setattr(os, "copy_file_range", partly)
        execute(plan, CopiedSource(tmp_path / "data", tensors), tmp_path / "copied")
        assert contents(tmp_path / "copied") == contents(tmp_path / "written")

    def test_a_disk_that_fills_up_is_no_reason_to_write(self, plan, tensors, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(OSError, match="No space left"):
            execute(plan, CopiedSource(tmp_path / "data", tensors), tmp_path / "copied")

    def test_what_is_copied_is_checked(self, plan, tensors, tmp_path):
        tensors["a"][299, 69] = torch.nan
        with pytest.raises(ValueError, match="source tensor 'a' holds 1 non-finite value among 21000"):
            execute(plan, CopiedSource(tmp_path / "data", tensors), tmp_path / "copied")
        assert not list((tmp_path / "copied").glob("*.safetensors*"))


def test_writes_in_several_steps_are_whole(tmp_path, monkeypatch):
    class Slow(FileIO):
        def write(self, data):
            return super().write(memoryview(data)[: max(1, len(data) // 2)])

    with Slow(tmp_path / "file", "wb") as file:
        shards._write_all(file, memoryview(b"every byte of it"))
    assert (tmp_path / "file").read_bytes() == b"every byte of it"


@pytest.mark.parametrize("size", [1, 31, 4096, 100_003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_value_is_found_wherever_it_stands(dtype, size):
    tensor = torch.full((size,), 3.0).to(dtype)
    for place in {0, size // 3, size - 1}:
        for value in (float("nan"), float("inf"), float("-inf")):
            damaged = tensor.clone()
            damaged[place] = value
            assert count_nonfinite(damaged) == 1
            damaged[size - 1 - place] = -value
            assert count_nonfinite(damaged) == (1 if place == size - 1 - place else 2)
    assert count_nonfinite(tensor) == 0


def test_an_empty_target_is_a_file_without_tensors(tmp_path):
    execute(Plan({}, {}, {}), MappingSource({}), tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_a_single_element_with_a_stride_is_written(tmp_path):
    wide = torch.arange(4.0).reshape(2, 2)
    source = MappingSource({"w": wide})
    column = Slice(Slice(Reference("w"), 1, 1, 2), 0, 0, 1)
    rest = (Discard("w", "not needed", ((1, 2), (0, 2))), Discard("w", "not needed", ((0, 1), (0, 1))))
    plan = Plan(source.schema, {"one": TensorInfo((1, 1), "float32")}, {"one": Permute(column, (1, 0))}, rest)
    execute(plan, source, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["one"].item() == 1.0
