"""The gallery of the documentation: what each attention attends to, for one patch of one photograph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vislm.files import atomic_write
from vislm.report.attention_views.figure import attention_figure
from vislm.report.attention_views.loading import load_backbone

PHOTOGRAPH = Path(__file__).parent.parent / "assets" / "photos" / "astronaut.jpg"
QUERY = "28%,43%"
"""The patch in all pictures: on the cheek."""
PAGE, FOLDER = "gallery.md", "gallery"


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery.

    Attributes:
        name: of its file, without ``.png``.
        title: its heading.
        text: what is to be seen.
        model: name of the backbone.
        stage: of the layer, None = the model has none.
        block: of the layer.
    """

    name: str
    title: str
    text: str
    model: str
    stage: int | None
    block: int


ENTRIES = (
    Entry(
        "dense",
        "Plain attention",
        "Every patch attends to every other one; what follows is measured against this. The model is timm's.",
        "deit_tiny_patch16_224",
        None,
        6,
    ),
    Entry(
        "window",
        "Windows (Swin)",
        "The map is cut into windows, whose patches attend to each other. The model is timm's.",
        "swin_tiny_patch4_window7_224",
        2,
        0,
    ),
    Entry(
        "shifted_window",
        "Shifted windows (Swin)",
        "The next block shifts the windows, so that the same patch sees others; windows at the border are cut.",
        "swin_tiny_patch4_window7_224",
        2,
        1,
    ),
    Entry(
        "neighborhood",
        "Neighborhood attention (NAT)",
        "The window is centred on each patch, and pushed inward at the picture's border.",
        "nat_mini",
        1,
        0,
    ),
    Entry(
        "dilated_neighborhood",
        "Dilated neighborhood attention (DiNAT)",
        "As many keys, every fourth patch, until they span the map.",
        "dinat_mini",
        1,
        1,
    ),
    Entry(
        "halo",
        "Halo attention (HaloNet)",
        "The patches of a block share their keys: the block and a halo around it.",
        "halonet_h0",
        1,
        1,
    ),
    Entry(
        "stripes",
        "Cross-shaped windows (CSWin)",
        "Half of the heads attend inside a vertical stripe, the others inside a horizontal one.",
        "agent_cswin_tiny",
        2,
        0,
    ),
    Entry(
        "agent",
        "Agent attention",
        "The query attends to agents, means of the queries in each cell; each agent has attended to all patches. The "
        "product of the two is what the query reads of each patch.",
        "agent_deit_tiny",
        None,
        6,
    ),
    Entry(
        "super_token",
        "Super tokens (STViT)",
        "Patches are grouped into super tokens by likeness: the lines are where the strongest association changes. "
        "Super tokens attend to each other, and the query reads those it is associated with.",
        "stvit_small",
        0,
        0,
    ),
    Entry(
        "hybrid_scale",
        "Hybrid-scale attention (SG-Former)",
        "Half of the heads attend to the window, half to a coarse map. What a patch receives from all is its "
        "significance.",
        "sg_former_small",
        1,
        0,
    ),
    Entry(
        "self_guided",
        "Self-guided attention (SG-Former)",
        "The next block merges many patches of little significance into a key, and few that matter.",
        "sg_former_small",
        1,
        1,
    ),
    Entry(
        "moh",
        "Mixture of heads (MoH-ViT)",
        "A router chooses heads for each patch; the small maps show who uses which. Inside the frame the query "
        "attends to single patches, outside to pooled ones.",
        "moh_vit_small_75",
        2,
        0,
    ),
    Entry(
        "large_kernel",
        "Large-kernel attention (VAN)",
        "No softmax: a convolution over the framed field makes a gate for each patch. Its kernel is two small ones, "
        "one of them with gaps, whose product is drawn.",
        "van_b0",
        1,
        0,
    ),
)
"""All pictures, in the page's order."""


def draw_gallery(out: Path) -> Iterator[Path]:
    """Draw all pictures into ``out/gallery``, then write the page ``out/gallery.md``; yield each path when written."""
    for entry in ENTRIES:
        yield attention_figure(
            load_backbone(entry.model),
            PHOTOGRAPH,
            out / FOLDER / f"{entry.name}.png",
            stage=entry.stage,
            block=entry.block,
            queries=(QUERY,),
        )
    with atomic_write(out / PAGE, "w") as handle:
        handle.write(page())
    yield out / PAGE


def page() -> str:
    """Return the page in Markdown."""
    return _HEAD + "".join(
        f"\n## {entry.title}\n\n{entry.text}\n\n![{entry.title}: {entry.model}]({FOLDER}/{entry.name}.png)\n\n"
        f"    {command(entry)}\n"
        for entry in ENTRIES
    )


def command(entry: Entry) -> str:
    """Return the command line that draws an entry for a picture of one's own."""
    stage = "" if entry.stage is None else f" --stage {entry.stage}"
    return (
        f"vislm visualize attention --model {entry.model}{stage} --block {entry.block} --query {QUERY} "
        f"--image photo.jpg --out {entry.name}.png"
    )


_HEAD = f"""# Gallery

What each attention of this package attends to: the same photograph and the same query patch (the orange square,
`--query {QUERY}` of height and width) for all of them. The weights are the layer's own, from the kernels' row
statistics.

**No weights here are trained.** All models are random (seed 0), since the package ships none: look at which patches a
query reaches and how they are grouped. The values, and the groups that follow from the content, say nothing about a
trained model. Give `--weights model.safetensors` for yours, or `--pretrained` for timm's.

The colour scale goes from the least to the largest weight of a picture; grey patches get none. This page and its
pictures are written by

    vislm visualize gallery --out docs

The command below each picture draws it for a picture of your own, at any layer (`--stage`, `--block`), for any patches
(`--query 4,7`, also several), and for single heads (`--head 3`). A picture of any size is scaled and, where the model's
size is fixed, cut around its centre; what is left is what is shown.
"""
