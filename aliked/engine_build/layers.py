"""The engine inspector's layers as a table."""


def layer_table(information: dict) -> str:
    """One line per layer: number, type, name, output types and tactic, as far as they are given.

    Without detailed profiling verbosity the inspector gives names only.
    """
    rows = [("#", "type", "name", "outputs", "tactic")]
    for index, layer in enumerate(information.get("Layers", [])):
        if isinstance(layer, str):
            rows.append((str(index), "", layer, "", ""))
            continue
        outputs = ", ".join(_describe(tensor) for tensor in layer.get("Outputs", []))
        tactic = layer.get("TacticName", layer.get("TacticValue", ""))
        rows.append(
            (str(index), layer.get("LayerType", ""), layer.get("Name", ""), outputs, str(tactic))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _describe(tensor: dict) -> str:
    """Shape and type of a tensor; TensorRT 11 gives in two fields what 10 gives in one."""
    kinds = ("Format/Datatype", "Format", "Datatype", "DataType")
    kind = " ".join(str(tensor[name]) for name in kinds if name in tensor)
    return f"{tensor.get('Dimensions', '')} {kind}".strip()
