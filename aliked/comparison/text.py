"""A comparison's numbers as text for people, with tables in Markdown."""

import textwrap

from aliked.benchmark.tables import markdown


def report_text(title: str, numbers: dict, radius: float) -> str:
    """What `Numbers.summary` gave, as Markdown; `radius` of the pairs in pixels."""
    total = numbers["total"]
    return "\n\n".join(
        [
            f"# {title}",
            _paragraph(
                f"Keypoints of both are each other's nearest and at most {radius:g} px apart; only "
                "the reference has the missed ones, only the other the extra ones."
            ),
            _image_table([*numbers["images"], {"image": "total"} | total]),
            _keypoint_remarks(total),
            _difference_table(total),
            _descriptor_table(total),
            _paragraph(_why_dot_products(total, numbers["descriptor_length"]) + _for_scale(total)),
            *_matching(numbers["consecutive"], total),
        ]
    )


def _image_table(rows: list[dict]) -> str:
    counts = ["reference", "other", "both", "missed", "extra"]
    header = ["image", *counts, "shift px: median", "max", "dot product: mean", "min"]
    return markdown(
        header,
        [
            [row["image"], *(str(row[name]) for name in counts)]
            + [_difference(row["shift_px"][name]) for name in ("median", "max")]
            + [_dot(row["dot_product"][name]) for name in ("mean", "min")]
            for row in rows
        ],
        left=1,
    )


def _keypoint_remarks(total: dict) -> str:
    text = f"Both found {_share(total['both'], total['reference'])} of the reference's keypoints."
    if total["missed_rank"]:
        text += f" The median rank by score of those missed is {total['missed_rank']:.0f}."
    if total["not_finite"]:
        text += f" NaN or infinity is in {total['not_finite']} keypoints."
    return _paragraph(text)


def _difference_table(total: dict) -> str:
    header = [f"differences of {total['both']} pairs", "median", "90 %", "99 %", "max"]
    lines = {"shift, px": total["shift_px"], "score": total["score_difference"]}
    rows = [[name, *map(_difference, values.values())] for name, values in lines.items()]
    return markdown(header, rows, left=1)


def _descriptor_table(total: dict) -> str:
    dot, element = total["dot_product"], total["element_difference"]
    rows = [
        ["dot product", _dot(dot["mean"]), _dot(dot["p1"]), _dot(dot["min"])],
        ["difference per element", _difference(element["mean"]), "", _difference(element["max"])],
    ]
    return markdown(["descriptors", "mean", "1st percentile", "worst"], rows, left=1)


def _why_dot_products(total: dict, dim: int) -> str:
    """What the lines about descriptors mean, with the numbers at hand."""
    largest = total["element_difference"]["max"]
    text = (
        "The dot product is the line that matters: descriptors have unit length, and matching "
        "compares their dot products, the cosines of the angles between them; it never looks at "
        f"an element. It falls short of 1 by half the sum of the squared differences: with every "
        f"one of {dim} elements off by 0.01, where their usual size is 1/sqrt({dim}) = "
        f"{dim**-0.5:.2g}, it is still {1 - dim * 1e-4 / 2:.4f}."
    )
    if largest:
        least, most = largest**2 / 2, min(2, dim * largest**2 / 2)
        text += (
            f" The largest difference of an element, {largest:.2g}, leaves open anything from "
            f"{least:.1g} to {most:.1g} below 1."
        )
    return text


def _for_scale(total: dict) -> str:
    """Where the worst dot products come from, and how much a change of view costs."""
    dot, similarity, text = total["dot_product"], total.get("match_similarity"), ""
    if total["crossed_pixel_edge"] and dot["min_within_pixel"] is not None:
        text = (
            f" In {total['crossed_pixel_edge']} pairs the keypoints lie on two sides of a pixel "
            "edge, and their descriptors come from patches a pixel apart; the worst of the others "
            f"is {_dot(dot['min_within_pixel'])}."
        )
    if similarity is not None and dot["mean"] is not None:
        text += (
            " For scale: the reference's matches between consecutive images have a median of "
            f"{similarity:.4f}; the change of view costs {1 - similarity:.2g}, the change of "
            f"runtime {abs(1 - dot['mean']):.1g} on average."
        )
    return text


def _match_table(rows: list[dict]) -> str:
    header = ["matches", "reference", "other", "kept", "lost", "of these keypoint missed", "gained"]
    counts = ("reference", "other", "kept", "lost", "undetected", "gained")
    return markdown(
        header, [[row["images"], *(str(row[name]) for name in counts)] for row in rows], left=1
    )


def _matching(consecutive: list[dict], total: dict) -> list[str]:
    if not consecutive:
        return ["There is only one image, so there is no matching to compare."]
    matches = total["matches"]
    rows = [{"images": f"{pair['first']} - {pair['second']}"} | pair for pair in consecutive]
    share = _share(matches["kept"], matches["reference"])
    remark = (
        "Matches are mutual nearest neighbours of the descriptors; a match is kept when both its "
        f"keypoints are pairs. Of the reference's matches {share} are kept."
    )
    return [_match_table([*rows, {"images": "total"} | matches]), _paragraph(remark)]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 90)


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _dot(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _share(part: int, whole: int) -> str:
    """A percentage, rounded down, so that only all are 100 %."""
    return f"{10000 * part // whole / 100:.2f} %" if whole else f"{part} of {whole}"
