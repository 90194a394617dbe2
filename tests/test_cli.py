"""The `gossamer` command: what it prints, what it refuses, and that a wrong kernel is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import gossamer
from gossamer import _C, bench, cli
from gossamer.layers import Linear

SMALL = ("bench", "--m", "3", "--k", "40", "--n", "24", "--seconds", "0")


@pytest.fixture
def call(monkeypatch, capsys):
    """call("bench", "--k", "8", ...) -> exit code, stdout, stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["gossamer", *args])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_info_names_versions_isas_and_kernels(call):
    code, out, _ = call("info")
    assert code == 0
    for word in (gossamer.__version__, f"{_C.isa()} (in use)", *_C.isas(), "gemm_int8", "spmm"):
        assert word in out


def test_bench_json_on_stdout_is_nothing_but_json(call):
    code, out, _ = call(*SMALL, "--json", "-", "--sparsity", "0.75")
    assert code == 0
    figures = json.loads(out)
    assert figures["machine"]["isa"] == _C.isa()
    assert figures["ceilings"]["fp32"] > 0
    (result,) = figures["results"]
    assert (result["m"], result["k"], result["n"], result["sparsity"]) == (3, 40, 24, 0.75)
    timings = {timing["name"]: timing for timing in result["timings"]}
    assert timings.keys() >= {bench.TORCH_FP32, *bench.FORMATS}
    for timing in timings.values():
        assert 0 < timing["p20_ms"] <= timing["p50_ms"] <= timing["p80_ms"]
        assert timing["share"] > 0 and timing["bound"] in ("fp32", "int8", "l2", "l3", "dram")
        assert timing["vs"].keys() == {bench.TORCH_FP32, "fbgemm"}
    # GFLOP/s count what is multiplied: a quarter of the weights in the sparse formats.
    share = timings["sparse"]["gflops"] * timings["sparse"]["p50_ms"]
    dense = timings[bench.TORCH_FP32]["gflops"] * timings[bench.TORCH_FP32]["p50_ms"]
    assert share == pytest.approx(dense / 4)


def test_bench_prints_a_table_and_writes_a_file(call, tmp_path):
    path = tmp_path / "figures.json"
    code, out, _ = call(*SMALL, "--format", "int8,sparse-int8", "--json", str(path))
    assert code == 0
    assert "gemm_int8" in out and "spmm_int8" in out and "weight-only" not in out
    assert len(json.loads(path.read_text())["results"]) == 1


def test_bench_sweeps_over_rows_and_sparsity(call):
    sweep = ("--rows", "1,3", "--sparsity", "0.5, 0.75", "--format", "sparse", "--peers", "none")
    code, out, _ = call("bench", "--k", "40", "--n", "24", "--seconds", "0", *sweep, "--json", "-")
    assert code == 0
    results = json.loads(out)["results"]
    assert [(r["m"], r["sparsity"]) for r in results] == [(1, 0.5), (1, 0.75), (3, 0.5), (3, 0.75)]
    for result in results:
        fp32, sparse = result["timings"]
        assert sparse["ops"] == pytest.approx(fp32["ops"] * (1 - result["sparsity"]))
        assert sparse["vs"].keys() == {bench.TORCH_FP32}


def test_bench_says_what_the_ceilings_are_and_how_much_faster_than_peers(call):
    code, out, _ = call(*SMALL, "--peers", "torch.sparse", "--format", "int8")
    assert code == 0
    assert out.startswith(f"ceilings of {_C.isa()}, 1 thread: fp32 ")
    assert "| times faster than | torch.sparse |" in out and "fbgemm" not in out


def test_bench_named_layers_with_other_rows_and_another_isa(call):
    args = ("--layer", "minilm.attention,minilm.ffn.up", "--m", "2", "--format", "int8")
    before = _C.isa()
    code, out, _ = call("bench", *args, "--isa", "base", "--seconds", "0", "--json", "-")
    assert code == 0
    results = json.loads(out)["results"]
    sizes = [(r["layer"], r["m"], r["k"], r["n"], r["isa"]) for r in results]
    assert sizes == [
        ("minilm.attention", 2, 384, 384, "base"),
        ("minilm.ffn.up", 2, 384, 1536, "base"),
    ]
    assert _C.isa() == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("nope",), "No such command"),
        (("bench", "--nope"), "No such option: --nope"),
        (("bench", "--m", "1,x"), "--rows 1,x: give whole numbers, separated by commas"),
        (("bench", "--sparsity", "many"), "--sparsity many: give numbers"),
        ((*SMALL, "--peers", "fbgemm,mine"), "unknown peer 'mine': use fbgemm, onednn"),
        ((*SMALL, "--plot", "no/such/folder"), "--plot no/such/folder: there is no such folder"),
        (("bench", "--threads", "0"), "Invalid value for '--threads'"),
        (("bench", "--layer", "nope"), "unknown layer 'nope': use minilm.attention"),
        (("bench", "--k", "8"), "give either --layer or both --k and --n"),
        (("bench", "--layer", "bert.ffn.up", "--k", "8", "--n", "8"), "give either --layer or"),
        (("bench", "--k", "8", "--n", "8", "--rows", "0"), "m=0 must be at least 1"),
        ((*SMALL, "--k", "70000"), "k=70000 overflows int32 (limit 65536)"),
        ((*SMALL, "--n", "99999999"), "choose a smaller layer"),
        ((*SMALL, "--format", "int8,int3"), "unknown format 'int3': use int8"),
        ((*SMALL, "--sparsity", "1.5"), "sparsity=1.5 is not in [0, 1)"),
        ((*SMALL, "--isa", "nope"), "cannot run the instruction set 'nope'"),
        ((*SMALL, "--json", "no/such/folder/x.json"), "there is no folder"),
        (("demo", "--json", "no/such/folder/x.json"), "there is no folder"),
        (("demo", "--threads", "-1"), "Invalid value for '--threads'"),
    ],
)
def test_a_mistake_gets_a_sentence_and_exit_code_2(call, args, sentence):
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert sentence in err.splitlines()[-1]
    assert "Traceback" not in err


def test_the_demo_without_its_data_says_what_to_install(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = call("demo")
    assert code == 2
    assert err.splitlines()[-1].endswith("pip install scikit-learn")


def test_an_unknown_isa_in_the_environment_is_a_sentence():
    command = [sys.executable, "-c", "from gossamer.cli import main; main()", "info"]
    done = subprocess.run(
        command, env={**os.environ, "GOSSAMER_ISA": "nope"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gossamer: GOSSAMER_ISA=nope")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", bench.FORMATS)
def test_a_wrong_result_is_never_timed(monkeypatch, name):
    right = Linear.forward

    def wrong(self, x):
        y = right(self, x).clone()
        y[1, 7] += 1e-3
        return y

    monkeypatch.setattr(Linear, "forward", wrong)
    with pytest.raises(AssertionError, match=rf"{name} .*worst at \(1, 7\)"):
        bench.linear(3, 40, 24, [name], seconds=0)


def test_a_torch_without_quantize_dynamic_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    result = bench.linear(3, 40, 24, ["int8"], seconds=0)
    assert [timing.name for timing in result.timings] == [bench.TORCH_FP32, "int8"]
    assert "without fbgemm: torch" in str(result) and "has no quantize_dynamic" in str(result)
