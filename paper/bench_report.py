"""What the benchmark's numbers say: rates, ratios, utilisation; as a table."""

from statistics import median

SAMPLE = 200  # tokens of a GSM8K sample, roughly: for samples/s beside the paper's
PAPER = {"samples_per_s": {"lora": 10.44, "hellora": 19.08}, "ratio": 1.83}  # Table 6, two A100
REFERENCES = ("peft", "hellora", "lora")  # the first of them that was measured is 1.00
REGIMES = {  # name -> LoRA on all experts, on the hot ones
    "grouped": ("lora", "hellora"),
    "loop": ("lora-loop", "hellora-loop"),
    "transformers 4 + PEFT": ("peft-v4-lora", "peft-v4-hellora"),
}


def ratios(a: list[float], b: list[float]) -> dict[str, float] | None:
    """How many times faster b is than a, from seconds, round by round; None if either was not measured."""
    each = [x / y for x, y in zip(a, b, strict=False)]  # a time budget may end a round in its middle
    return {"median": median(each), "least": min(each), "most": max(each)} if each else None


def summarise(record: dict) -> None:
    """Add to the record what follows from it, as far as it goes."""
    rows, tokens = record["rows"], record.get("world", {}).get("tokens")
    measured = [name for name, row in rows.items() if row["seconds"]]
    for name in measured:
        row, peak = rows[name], record["matmul_flops_per_s"]
        row["tokens_per_s"] = tokens / median(row["seconds"])
        row["samples_per_s"] = row["tokens_per_s"] / SAMPLE
        if peak and row["flops_a_token"]:
            row["roofline_tokens_per_s"] = peak / row["flops_a_token"]
            row["utilisation"] = row["tokens_per_s"] / row["roofline_tokens_per_s"]
    reference = next((name for name in (*REFERENCES, *measured) if name in measured), None)
    for name in measured:
        row = rows[name]
        row["faster"] = ratios(rows[reference]["seconds"], row["seconds"])
    record["reference"], record["paper"], record["regimes"] = reference, PAPER, regimes(rows)
    losses = [row["loss"] for row in rows.values() if "loss" in row]
    if losses:  # adapters start as nothing, so all first losses are the base model's
        record["losses_differ_by"] = (max(losses) - min(losses)) / abs(median(losses))


def regimes(rows: dict[str, dict]) -> dict[str, dict]:
    """LoRA -> HELLoRA in each way of multiplying: in time, and in operations a layer."""
    out = {}
    for regime, (everywhere, hot) in REGIMES.items():
        a, b = rows.get(everywhere, {}), rows.get(hot, {})
        if a.get("operations_a_layer") and b.get("operations_a_layer"):
            out[regime] = {"operations": a["operations_a_layer"] / b["operations_a_layer"]}
            out[regime]["time"] = ratios(a["seconds"], b["seconds"])
    return out


def cell(value: float | None, pattern: str) -> str:
    """A number, or a dash, as wide as the number would be."""
    width = len(pattern.format(0))
    return f"{'-':>{width}}" if value is None else pattern.format(value)


COLUMNS = (  # head, pattern, value of a row
    ("tokens/s", "{:>10,.0f}", lambda row: row.get("tokens_per_s")),
    ("samples/s", "{:>10.1f}", lambda row: row.get("samples_per_s")),
    ("ratio", "{:>7.2f}", lambda row: (row.get("faster") or {}).get("median")),
    ("least", "{:>6.2f}", lambda row: (row.get("faster") or {}).get("least")),
    ("most", "{:>6.2f}", lambda row: (row.get("faster") or {}).get("most")),
    ("roofline", "{:>10,.0f}", lambda row: row.get("roofline_tokens_per_s")),
    ("MFU", "{:>6.1%}", lambda row: row.get("utilisation")),
    ("peak GB", "{:>9.2f}", lambda row: row["peak_bytes"] / 1e9 if row.get("peak_bytes") else None),
    ("ops/layer", "{:>10,d}", lambda row: row.get("operations_a_layer")),
    ("trained", "{:>14,d}", lambda row: row.get("trained")),
)


def show(record: dict) -> None:
    """Print the table and what follows from it."""
    rows, world, at = record["rows"], record["world"], record["hardware"]
    settings, width = record["settings"], max(map(len, record["rows"]))
    print(
        f"\n{settings['model'] or settings['shape']}, {settings['dtype']}, {world['tokens']} tokens a step "
        f"in {world['sequences']} sequences, hot experts get {world['hot_share']:.1%} of the visits; "
        f"weights {world['weight_bytes'] / 1e9:.2f} GB"
    )
    print(
        f"{at.get('gpu') or at['cpu']}, {at['threads']} threads, {record['date'][:10]}, torch "
        f"{record['versions']['torch']}; by {record['clock']}, median of rounds"
    )
    if peak := record.get("matmul_flops_per_s"):
        print(f"best matrix product {peak / 1e12:.3f} TFLOP/s, which is what roofline and MFU refer to")
    decoded(record)
    print("".ljust(width) + "".join(f"{head:>{len(p.format(0))}}" for head, p, _ in COLUMNS))
    for name, row in rows.items():
        print(name.ljust(width) + "".join(cell(value(row), pattern) for _, pattern, value in COLUMNS))
    for name, row in rows.items():
        if "failed" in row:
            print(f"{name} failed at {row['failed']}")
    theirs = ", ".join(f"{name} {rate}" for name, rate in PAPER["samples_per_s"].items())
    print(f"ratio: times as fast as {record['reference']}, in the same round")
    print(f"samples of {SAMPLE} tokens (the paper's rates, on two A100: {theirs})")
    if "losses_differ_by" in record:
        print(f"the first losses of all configurations agree to {record['losses_differ_by']:.1e}")
    for regime, value in record["regimes"].items():
        time = f"{value['time']['median']:.2f}x in time, " if value["time"] else ""
        operations = f"{value['operations']:.2f}x in operations"
        print(f"lora -> hellora, {regime}: {time}{operations} (paper: {PAPER['ratio']}x in time)")


def decoded(record: dict) -> None:
    """Print the rates of decoding and the times of loading."""
    for name, row in record.get("generate", {}).items():
        cases = [
            f"{case} {median(row[f'{case}_rates']):,.0f} tokens/s of {row[f'{case}_mean_length']:.0f} each"
            for case in ("equal", "uneven")
            if isinstance(row, dict) and row.get(f"{case}_rates")
        ]
        print(f"decode, {name}: {', '.join(cases) or row}")
    loads = record.get("load", {})
    for name, row in loads.items():
        if isinstance(row, dict) and row["seconds"]:
            print(f"load, {name}: {median(row['seconds']):.2f} s for {loads['bytes'] / 1e9:.2f} GB")
        elif isinstance(row, dict):
            print(f"load, {name}: {row}")
