"""Writes bench/RESULTS.md from bench/results/*.json: the records as tables; nothing is measured.

Every table comes with the device, versions, commit and command of its record. Failed checks are
listed, and a row that failed shows neither a ratio nor a speed-up.

    python -m bench.report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, TARGETS
from csrc_triton.device import PEAKS
from v2l_fast.files import write_text

Record = Mapping[str, Any]
FAILED = "failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=RESULTS.parent / "RESULTS.md")
    options = parser.parse_args()
    text = report([json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))])
    write_text(options.out, text)
    print(f"written to {options.out}")


def report(records: Iterable[Record]) -> str:
    """The page; of a benchmark that is not known here, the rows as they are."""
    parts = ["# Results", "Written by `python -m bench.report` from `bench/results/`."]
    parts += ["## Peaks and targets", _targets()]
    for record in records:
        name = record.get("benchmark", "unnamed")
        title, body, command = SECTIONS.get(name, (name, _unknown, None))
        parts += [f"## {title}", _origin(record, command), body(record)]
    return "\n\n".join(parts) + "\n"


# --- sections --------------------------------------------------------------------------------


def _targets() -> str:
    """The peaks of the GPUs that have targets, and the targets by shape."""
    rows = []
    for card, shapes in TARGETS.items():
        peak = PEAKS[card]
        for shape, limits in shapes.items():
            memory = limits.get("internalize_1024_bytes")
            rows.append([
                card, f"{peak.flops / 1e12:.0f}", f"{peak.bandwidth / 1e12:.2f}", shape,
                _ms(limits["time_to_first_token"]), f"{limits['weight_floor_share']:.0%}",
                _ms(limits["internalize_12_seconds"]),
                "" if memory is None else f"{memory / 1e9:.0f}",
            ])  # fmt: skip
    note = (
        "Datasheet peaks, dense bfloat16. Targets are limits of times and memory, and a least "
        "share of the tokens per second that reading the weights allows. A record below says what "
        "was measured.\n\n"
    )
    return note + _table(
        ["GPU", "TFLOP/s", "TB/s", "shape", "first token ms", "share of weight floor",
         "12 frames internalized ms", "1,024 frames GB"], rows,
    )  # fmt: skip


def _hypernet_streaming(record: Record) -> str:
    rows, products = [], []
    for row in record["rows"]:
        for variant, own in row["variants"].items():
            rows.append([
                row["tokens"], row["layers"], variant, f"{own['seconds']:.2f}",
                _ratio(own.get("seconds_ratio"), row["correct"]), _gib(own["peak_bytes"]),
                _ratio(own.get("peak_bytes_ratio"), row["correct"]),
                f"{own['product_share']:.0%}", _share(own.get("all_product_share")),
                _share(own.get("memory_product_share")), f"{own['relative_error']:.1e}",
            ])  # fmt: skip
            products += [
                [row["tokens"], product["name"], " x ".join(map(str, product["shape"])),
                 product["dtype"], f"{product['gflops']:.0f}", f"{product['memory_gflops']:.0f}"]
                for product in own.get("products", []) if variant.startswith("groups")
            ]  # fmt: skip
    table = _table(
        ["tokens", "layers", "order", "CPU s", "time ratio", "peak GiB", "memory ratio",
         "products with the context", "all products", "all from memory", "error"], rows,
    )  # fmt: skip
    if not products:
        return table
    note = (
        "\nGFLOP per CPU second of the plain products that the shares compare with, in groups. "
        "`all products` takes those whose matrices a cache may hold, and the attention's for the "
        "latents; `all from memory` takes each shape's own with matrices from memory. Waiting "
        f"threads: `OMP_WAIT_POLICY={record['wait_policy']}`.\n\n"
    )
    return (
        table
        + note
        + _table(["tokens", "product", "shape", "dtype", "GFLOP/s", "from memory"], products)
    )


def _ops(record: Record) -> str:
    """A row for each group of pytest-benchmark: medians, and their ratio to ours."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in record["benchmarks"]:
        groups.setdefault(result["group"], {})[result["extra_info"]["variant"]] = result
    names = list(dict.fromkeys(variant for group in groups.values() for variant in group))
    others = [name for name in names if name != "ours"]
    rows = []
    for group, variants in groups.items():
        ours = variants.get("ours")
        # A variant that failed its correctness gate has no time, and no ratio to it is shown.
        base = ours["stats"]["median"] if ours else None
        cells = [group, _ms(base) if ours else FAILED]
        for name in others:
            rival = variants.get(name)
            time = rival["stats"]["median"] if rival else None
            ratio = f" ({time / base:.2f}x)" if time and base else ""
            cells.append(_ms(time) + ratio)
        info = ours["extra_info"] if ours else {}
        share = info.get("roofline_share")
        cells.append("" if share is None else f"{share:.0%}")
        rows.append([*cells, _number(info.get("relative_error"))])
    note = (
        "Medians in milliseconds and, in brackets, relative to ours. Every variant was compared "
        "with float64 before it was timed. `bare` is the linear layer without an adapter, `merged` "
        "the one with the adapter added to its weights; both compute less.\n\n"
    )
    return note + _table(["op", "ours", *others, "roofline", "error of ours"], rows)


def _train_step(record: Record) -> str:
    rows, stages = [], []
    # The slowest case first.
    for row in sorted(record["rows"], key=lambda row: row.get("speedup", 0.0)):
        old, new, right = row["released"], row["ours"], row["correct"]
        batch = f"{row['videos']} x {row['prompts']} x {row['frames']}"
        rows.append([
            row["case"], batch, f"{old['samples_per_second']:.2f}",
            f"{new['samples_per_second']:.2f}",
            f"{row['speedup']:.2f}x" if right else FAILED,
            _gib(old["peak_bytes"]), _gib(new["peak_bytes"]),
            _ratio(row.get("peak_bytes_ratio"), right), f"{row['gradient_error']:.1e}",
        ])  # fmt: skip
        for order in ("released", "ours"):
            split = (_ms(row[order]["stages"][stage]) for stage in row[order]["stages"])
            stages.append([row["case"], order, *split, _ms(row[order]["decode_seconds"])])
    names = list(record["rows"][0]["ours"]["stages"])
    return "\n\n".join([
        "A batch is videos x prompts x frames; a sample is one prompt.",
        _table(["case", "batch", "released samples/s", "ours samples/s", "speed-up",
                "released GiB", "ours GiB", "peak memory ratio", "gradient error"], rows),
        "Milliseconds by stage; decoding is done ahead of the step, by data workers.",
        _table(["case", "order", *names, "decoding, CPU"], stages),
    ])  # fmt: skip


def _decode(record: Record) -> str:
    rows = [
        [
            row["case"], row["codec"], f"{row['size'][0]} x {row['size'][1]}", backend,
            _count(result.get("frames_per_second")),
            f"{result['error']['mean']:.2f}" if "error" in result else "not there",
        ]
        for row in record["rows"]
        for backend, result in row["backends"].items()
    ]  # fmt: skip
    return "Errors are mean absolute differences from PyAV's frames, of 255.\n\n" + _table(
        ["frames", "codec", "size", "decoder", "frames/s", "error"], rows
    )


def _decode_training(record: Record) -> str:
    rows = [
        [
            row["case"], order, f"{result['cpu_seconds']:.2f}",
            f"{result['videos_per_second_and_core']:.1f}",
            "yes" if result["equal_to_ours"] else "no", f"{row['pixel_error']:.2f}",
        ]
        for row in record["rows"]
        for order, result in row["orders"].items()
    ]  # fmt: skip
    load = " to ".join(f"{value:.0f}" for value in record["load"])
    note = (
        f"From opening a file to {record['frames']} views of {record['tile']} pixels; CPU time of "
        f"all threads, while the machine's load was {load} on {record['cores']} cores. Resizing to "
        f"the tower's size takes {record['resize_cpu_seconds']:.2f} s of it. Writing the copy took "
        f"{record['copying_cpu_seconds']:.1f} s once. The error is the mean absolute difference of "
        "our views from those of the original, of 255, on a pattern of saturated edges.\n\n"
    )
    return note + _table(
        ["video", "order", "CPU s a video", "videos/s and core", "our pixels", "error"], rows
    )


def _serve(record: Record) -> str:
    note = (
        f"One question of {record['question_tokens']} tokens, {record['visual_tokens']} visual "
        f"tokens where the video is in context, {record['new_tokens']} new tokens."
    )
    if not record["passed"]:
        return f"{note} {FAILED}: answers of {', '.join(record['disagree'])} differ."
    head = ["way", "time to first token, ms", "tokens/s"]
    rows = [
        [way, _ms(times["time_to_first_token"]), f"{times['tokens_per_second']:.0f}"]
        for way, times in record["ways"].items()
    ]
    if all("weight_floor_share" in times for times in record["ways"].values()):
        head.append("of the weight-bandwidth floor's")
        for row, times in zip(rows, record["ways"].values(), strict=True):
            row.append(f"{times['weight_floor_share']:.0%}")
    return f"{note}\n\n" + _table(head, rows)


def _engine(record: Record) -> str:
    prompts = ", ".join(f"{count} ({name})" for name, count in record["prompt_tokens"].items())
    note = (
        f"{record['clients']} requests at once, {record['adapters']} adapters, "
        f"{record['new_tokens']} new tokens each, prompts of {prompts} tokens, random weights."
    )
    if not record["passed"]:
        return f"{note} {FAILED}: {record['reason']}."
    rows = []
    for source, times in record["sources"].items():
        ratios = times["ratios"]
        for system in ("ours", "transformers"):
            own = times[system]
            cells = [source, system, f"{own['tokens_per_second']:.0f}",
                     _ms(own["time_to_first_token"]), _ms(own["last_first_token"])]  # fmt: skip
            shown = system == "ours"
            cells += [f"{ratio:.2f}x" if shown else "" for ratio in ratios.values()]
            rows.append(cells)
    note += (
        f" Ours, adapters relative to the plain model: {record['adapter_to_plain']:.2f}x of the "
        f"tokens/s; to videos in context: {record['adapter_to_context']:.2f}x. Medians of "
        f"{record['rounds']} rounds; ratios of ours to transformers' `generate`.\n\n"
    )
    head = ["answered from", "system", "tokens/s", "first token ms", "last first token ms",
            "ratio of tokens/s", "ratio of first token"]  # fmt: skip
    return note + _table(head, rows)


def _serve_load(record: Record) -> str:
    """Of a benchmark that is no longer here: the engine without HTTP."""
    load, alone = record["load"], record["one_at_a_time"]
    first, between = load["time_to_first_token"], load["between_pieces"]
    memory = record["resident_bytes"]
    return _table(
        ["what", "value"],
        [
            ["clients, adapters", f"{record['clients']}, {record['adapters']}"],
            ["minutes", f"{load['seconds'] / 60:.1f}"],
            ["requests", load["requests"]],
            ["errors, wrong answers", f"{load['error_count']}, {load['wrong_answers']}"],
            ["requests/s, one at a time", f"{alone['requests_per_second']:.2f}"],
            ["requests/s, together", f"{load['requests_per_second']:.2f}"],
            ["ratio", f"{record['speedup']:.2f}x"],
            ["time to first token, p50 and p95, ms", f"{_ms(first['p50'])}, {_ms(first['p95'])}"],
            ["between tokens, p50 and p95, ms", f"{_ms(between['p50'])}, {_ms(between['p95'])}"],
            ["resident memory at the end", f"{_gib(memory['end'])} GiB"],
            ["its growth after settling", f"{memory['growth']:.2%}"],
        ],
    )


def _serve_http(record: Record) -> str:
    quiet, load, memory = record["quiet"], record["load"], record["resident_bytes"]

    def both(what: str, value: Callable[[Record], str]) -> list[str]:
        return [what, value(quiet), value(load)]

    def times(name: str) -> Callable[[Record], str]:
        return lambda phase: f"{_ms(phase[name]['p50'])}, {_ms(phase[name]['p95'])}"

    clip = record["clip_8k"]
    odd = ", ".join(f"{count} {name}" for name, count in record["odd"].items())
    note = (
        f"{record['clients']} clients over HTTP, {record['official_clients']} of them OpenAI's, "
        f"{record['adapters']} adapters. Beside odd clients: {odd}, one clip of 8K "
        + ("that failed" if clip is None else f"internalized in {clip['seconds']:.0f} s")
        + f"; {record['problem_count']} of them not answered as they should be."
    )
    table = _table(
        ["at the client", "quiet", "beside odd clients"],
        [
            both("minutes", lambda phase: f"{phase['seconds'] / 60:.1f}"),
            both("requests", lambda phase: str(phase["requests"])),
            both("lost, wrong answers",
                 lambda phase: f"{phase['error_count']}, {phase['wrong_answers']}"),
            both("requests/s", lambda phase: f"{phase['requests_per_second']:.1f}"),
            both("time to first token, p50 and p95, ms", times("time_to_first_token")),
            both("between pieces, p50 and p95, ms", times("between_pieces")),
            ["time to first token, p95, ratio", "", f"{record['first_token_ratio']:.2f}x"],
            ["resident memory, first and last minute, GiB", "",
             f"{_gib(memory['first'])}, {_gib(memory['last'])}"],
        ],
    )  # fmt: skip
    return f"{note}\n\n{table}"


def _gpu(record: Record) -> str:
    parts = ["Tiny sizes: a trial of the script."] if record.get("quick") else []
    checks = record["checks"]
    right = sum(row["passed"] for row in checks)
    parts.append(f"{right} of {len(checks)} checks passed.")
    if record["failed"]:
        parts.append("Failed: " + ", ".join(f"`{name}`" for name in record["failed"]) + ".")
    if record["left_out"]:
        parts.append("Left out: " + ", ".join(record["left_out"]) + ".")
    parts.append("### Ops\n\nMedians in microseconds with a cold L2 cache; ratios to ours.")
    names = list(dict.fromkeys(name for row in record["ops"] for name in row.get("seconds", ())))
    others = [name for name in names if name != "ours"]
    rows = []
    for row in record["ops"]:
        right, seconds = row["passed"], row.get("seconds", {})
        speedups = row.get("speedups", {}) if right else {}
        cells = [row["name"], f"{seconds['ours'] * 1e6:.1f}" if right else FAILED]
        cells += [_against(name, seconds, speedups, row) for name in others]
        known = right and "roofline_share" in row
        cells += [f"{row['gb_per_second']:.0f}" if known else "",
                  f"{row['tflop_per_second']:.1f}" if known else "",
                  f"{row['roofline_share']:.0%}" if known else ""]  # fmt: skip
        rows.append([*cells, _number(row.get("error"))])
    parts.append(_table(["op", "ours", *others, "GB/s", "TFLOP/s", "roofline", "error"], rows))
    # A record that is older than a section lacks it.
    for title, section, body in (
        ("Internalizing, milliseconds", "internalize", _stages),
        ("Answering a question", "answer", _serve),
        ("Many requests at once", "serve", _engine),
        ("A training step", "train", lambda row: _train_step({"rows": [row]})),
    ):
        for row in record.get(section, ()):
            text = body(row) if "reason" not in row else f"{FAILED} ({row['reason']})"
            parts += [f"### {title}: {row['name']}", text]
    return "\n\n".join(parts)


def _stages(row: Record) -> str:
    variants = list(row["variants"])
    stages = list(dict.fromkeys(s for v in variants for s in row["variants"][v]))
    body = [[stage, *(_ms(row["variants"][v].get(stage)) for v in variants)] for stage in stages]
    head = f"Random weights, {row['context_tokens']} context tokens, error {row['error']:.1e}.\n\n"
    return head + _table(["stage", *variants], body)


def _tune(record: Record) -> str:
    body = []
    for entry in record["entries"]:
        best = min(entry["candidates"], key=lambda c: c["measured"])
        known = best["predicted"] is not None
        order = entry["same_order"]
        body.append([
            entry["op"], json.dumps(entry["where"]), json.dumps(best["tile"]),
            f"{best['measured'] * 1e6:.2f}", f"{best['predicted'] * 1e6:.2f}" if known else "",
            f"{best['ratio']:.2f}" if known else "", "" if order is None else f"{order:.0%}",
        ])  # fmt: skip
    head = "The fastest tile of each entry; the share of pairs of tiles that the model orders "
    head += "as they were measured.\n\n"
    names = ["op", "shape", "tile", "measured us", "predicted us", "ratio", "same order"]
    return head + _table(names, body)


def _unknown(record: Record) -> str:
    rows = record.get("rows", [])
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _table(names, [[row.get(name, "") for name in names] for row in rows])


# Benchmark -> title, body, and the module or command that runs it.
SECTIONS: dict[str, tuple[str, Callable[[Record], str], str | None]] = {
    "hypernet_streaming": (
        "Internalizing on a CPU: released and ours",
        _hypernet_streaming,
        "bench.runs.hypernet_streaming",
    ),
    "ops": ("Every op against its baselines", _ops, None),
    "train_step": (
        "A training step: released order and ours",
        _train_step,
        "bench.runs.train_step",
    ),
    "decode": ("Decoding video", _decode, "bench.runs.decode"),
    "decode_training": (
        "Reading training videos: released order and ours",
        _decode_training,
        "bench.runs.decode",
    ),
    "serve_shapes_cpu": (
        "Answering a question, shipped model on a CPU",
        _serve,
        "bench.runs.answer",
    ),
    "serve_500M_cuda": ("Answering a question, 500M shape on a GPU", _serve, "bench.runs.answer"),
    "serve_2.2B_cuda": ("Answering a question, 2.2B shape on a GPU", _serve, "bench.runs.answer"),
    "engine_500M_cuda": (
        "Many requests at once, 500M shape on a GPU",
        _engine,
        "bench.runs.engine",
    ),
    "engine_2.2B_cuda": (
        "Many requests at once, 2.2B shape on a GPU",
        _engine,
        "bench.runs.engine",
    ),
    "serve_http": (
        "The server under load, over HTTP, shipped model",
        _serve_http,
        "bench.runs.serve",
    ),
    "serve_load": ("The engine under load, shipped model", _serve_load, None),
    "gpu": ("On a GPU", _gpu, "bench.runs.gpu"),
    "tune": ("Tiles: prediction and measurement", _tune, "bench.runs.tune"),
}


# --- cells -----------------------------------------------------------------------------------


def _origin(record: Record, now: str | None) -> str:
    """Device, versions, commit and command in one line, with the command's name ``now``."""
    if record.get("benchmarks"):
        # pytest-benchmark's: the machine, and the origin in each result.
        record = {**record["machine_info"], **record["benchmarks"][0]["extra_info"]}
    commit = (record.get("commit") or "unknown")[:10]
    if record.get("uncommitted_changes"):
        commit += " with uncommitted changes"
    packages = {"torch": record.get("torch"), "Python": record.get("python")}
    packages |= record.get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    threads = f", threads: {record['threads']}" if "threads" in record else ""
    device, command = record.get("device", "unknown"), record.get("command", "unknown")
    if now is not None and now not in command:
        command += f"`, now `python -m {now}"
    return f"{device}{threads}; {versions}; commit {commit}; `{command}`"


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _ratio(value: float | None, right: bool) -> str:
    return f"{value:.3f}" if right and value is not None else FAILED


def _against(name: str, seconds: Mapping, speedups: Mapping, row: Record) -> str:
    if name not in seconds:
        return row.get("failures", {}).get(name, "")
    times = f" ({speedups[name]:.2f}x)" if name in speedups else ""
    return f"{seconds[name] * 1e6:.1f}{times}"


def _share(value: float | None) -> str:
    """Older records lack it."""
    return "" if value is None else f"{value:.0%}"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    main()
