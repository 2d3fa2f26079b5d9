"""The results of the benchmark: rates, ratios and utilisation, in a table."""

from statistics import median

from paper.runs.stats import aligned
from paper.studies.tables import printed, ratio

SAMPLE = 200  # tokens of a GSM8K sample, roughly, to give samples/s as the paper does
PAPER = {  # on two A100 GPUs
    "samples_per_s": {name: printed("6", name, "samples/s") for name in ("lora", "hellora")},
    "ratio": round(ratio("6", "hellora", "lora", "samples/s"), 2),
}
REFERENCES = ("peft", "hellora", "lora")  # the first one that was measured has the ratio 1.00
REGIMES = {  # name -> LoRA on all experts, LoRA on the hot ones
    "grouped": ("lora", "hellora"),
    "loop": ("lora-loop", "hellora-loop"),
    "transformers 4 + PEFT": ("peft-v4-lora", "peft-v4-hellora"),
}


def ratios(a: dict, b: dict) -> dict[str, float] | None:
    """Row b is so many times as fast as row a, round by round. None if one was not measured."""
    # Time may end in the middle of a round, so one row may have fewer rounds.
    each = [x / y for x, y in zip(a["seconds"], b["seconds"], strict=False)]
    return {"median": median(each), "least": min(each), "most": max(each)} if each else None


def summarise(record: dict) -> None:
    """Add the derived numbers to the record, as far as it is complete."""
    rows = record["rows"]
    measured = {name: row for name, row in rows.items() if row["seconds"]}
    reference = next((name for name in (*REFERENCES, *measured) if name in measured), None)
    for row in measured.values():
        row["tokens_per_s"] = record["world"]["tokens"] / median(row["seconds"])
        row["samples_per_s"] = row["tokens_per_s"] / SAMPLE
        row["faster"] = ratios(rows[reference], row)
        if row["flops_a_token"] and record["matmul_flops_per_s"]:
            row["roofline_tokens_per_s"] = record["matmul_flops_per_s"] / row["flops_a_token"]
            row["utilisation"] = row["tokens_per_s"] / row["roofline_tokens_per_s"]
    record |= {"reference": reference, "paper": PAPER, "regimes": {}}
    for regime, (everywhere, hot) in REGIMES.items():
        pair = [
            rows[name] for name in (everywhere, hot) if rows.get(name, {}).get("operations_a_layer")
        ]
        if len(pair) == 2:
            operations = pair[0]["operations_a_layer"] / pair[1]["operations_a_layer"]
            record["regimes"][regime] = {"operations": operations, "time": ratios(*pair)}
    losses = [row["loss"] for row in rows.values() if "loss" in row]
    if losses:  # adapters start at zero, so each first loss is that of the base model
        record["losses_differ_by"] = (max(losses) - min(losses)) / abs(median(losses))


COLUMNS = (  # head, format, value of a row
    ("tokens/s", ",.0f", lambda row: row.get("tokens_per_s")),
    ("samples/s", ".1f", lambda row: row.get("samples_per_s")),
    ("ratio", ".2f", lambda row: (row.get("faster") or {}).get("median")),
    ("least", ".2f", lambda row: (row.get("faster") or {}).get("least")),
    ("most", ".2f", lambda row: (row.get("faster") or {}).get("most")),
    ("roofline", ",.0f", lambda row: row.get("roofline_tokens_per_s")),
    ("MFU", ".1%", lambda row: row.get("utilisation")),
    ("GB", ".2f", lambda row: row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None),
    ("ops", ",d", lambda row: row.get("operations_a_layer")),
    ("trained", ",d", lambda row: row.get("trained")),
)


def cell(value: float | None, pattern: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, pattern)


def show(record: dict) -> None:
    """Print everything, the table at the end."""
    rows, world, settings = (record[name] for name in ("rows", "world", "settings"))
    show_others(record)
    versions = record["versions"]
    peak = record.get("matmul_flops_per_s", 0) / 1e12
    paper = ", ".join(f"{method} {rate}" for method, rate in PAPER["samples_per_s"].items())
    print(
        "\n"
        f"{settings['model'] or settings['shape']}, {settings['dtype']}, {world['tokens']} "
        f"tokens a step in {world['sequences']} sequences, hot experts get "
        f"{world['hot_share']:.1%} of the visits, weights {world['weight_bytes'] / 1e9:.2f} GB\n"
        f"{versions['device']}, {record['hardware']}\n"
        f"torch {versions['torch']}, {record['date'][:10]}, medians of rounds, {record['clock']}\n"
        f"the fastest matrix product makes {peak:.3f} TFLOP/s: roofline and MFU refer to it\n"
        f"ratio: times as fast as {record['reference']}, in the same round (median, least, most)\n"
        "GB: peak of memory. ops: operations of a layer\n"
        f"a sample has {SAMPLE} tokens (the paper's samples/s, on two A100: {paper})"
    )
    table = [["", *(head for head, *_ in COLUMNS)]]
    for name, row in rows.items():
        table.append([name, *(cell(value(row), pattern) for _, pattern, value in COLUMNS)])
    print(*aligned(table), sep="\n")


def show_others(record: dict) -> None:
    """Print decoding and loading, the ratios of regimes, and failures."""
    decoded, loaded = record.get("generate", {}), record.get("load", {})
    for name, row in decoded.items():
        if row["seconds"]:
            ours = decoded[f"{name.partition(':')[0]}: ours"]
            faster = ratios(row, ours) if row is not ours else None
            rate = f"{row['tokens'] / median(row['seconds']):,.0f} tokens/s"
            beside = f" (ours: {faster['median']:.2f} times as fast)" if faster else ""
            print(f"decode, {name}: {rate}{beside}")
    for name, row in loaded.items():
        if row["seconds"]:
            print(f"load, {name}: {median(row['seconds']):.2f} s")
    if record["regimes"]:
        print(f"lora -> hellora (paper: {PAPER['ratio']}x in time)")
    for regime, value in record["regimes"].items():
        spread = "{median:.2f}x in time ({least:.2f} to {most:.2f}), "
        time = spread.format(**value["time"]) if value["time"] else ""
        print(f"  {regime}: {time}{value['operations']:.2f}x in operations")
    if "losses_differ_by" in record:
        print(f"the first losses of all configurations differ by {record['losses_differ_by']:.1e}")
    for name, row in (record["rows"] | decoded | loaded).items():
        if "failed" in row:
            print(f"{name} failed at {row['failed']}")
