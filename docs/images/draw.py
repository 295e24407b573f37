"""Command: draws docs/images/architecture.svg.

    python docs/images/draw.py

The image has its own background and follows the light or dark mode of the reader.
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 1000, 380
BOX_WIDTH, BOX_HEIGHT = 144, 62
MODEL_Y, REQUEST_Y = 56, 234
LEFT, STEP = 18, 164

STYLE = """
  .page { fill: #ffffff } .box { fill: #f3f5f8; stroke: #8a94a3 } .files { fill: #fff4d6; stroke: #b98900 }
  .engine { fill: #e3f1e6; stroke: #3f8f52 } .client { fill: #e6eefb; stroke: #4a78bd }
  .title { fill: #1c2430; font-weight: 600 } .text { fill: #1c2430 } .note { fill: #566070 }
  .arrow { stroke: #566070; fill: none } .tip { fill: #566070 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0f141b } .box { fill: #1d2530; stroke: #6b7787 } .files { fill: #3a3013; stroke: #c9a03a }
    .engine { fill: #17331f; stroke: #58a86b } .client { fill: #182a45; stroke: #6d9be0 }
    .title, .text { fill: #e7ecf3 } .note { fill: #a5b0bf }
    .arrow { stroke: #a5b0bf } .tip { fill: #a5b0bf }
  }
"""  # noqa: E501

MODEL_PATH = (
    ("box", "Card", "weights, labels"),
    ("box", "PyTorch", "architecture"),
    ("box", "ONNX", "traced graph"),
    ("engine", "Engine", "OpenVINO, TensorRT"),
    ("box", "Golden check", "against PyTorch"),
    ("files", "Repository", "versions on disk"),
)
REQUEST_PATH = (
    ("client", "Client", "images, deadline"),
    ("box", "Transport", "HTTP/2, HTTP/1.1"),
    ("box", "API", "parse, route, admit"),
    ("box", "Images", "decode, resize"),
    ("box", "Scheduler", "fill a batch"),
    ("engine", "Engine", "run the batch"),
)


def box(index: int, y: int, kind: str, name: str, detail: str) -> str:
    x = LEFT + index * STEP
    middle = x + BOX_WIDTH // 2
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"/>'
        f'<text class="title" x="{middle}" y="{y + 27}" text-anchor="middle">{name}</text>'
        f'<text class="note" x="{middle}" y="{y + 47}" text-anchor="middle" font-size="13">'
        f"{detail}</text>"
    )


def arrow(*points: tuple[int, int]) -> str:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="arrow" d="{path}" marker-end="url(#tip)"/>'


def row(title: str, y: int, boxes: tuple[tuple[str, str, str], ...]) -> list[str]:
    parts = [f'<text class="text" x="{LEFT}" y="{y - 20}">{title}</text>']
    for index, (kind, name, detail) in enumerate(boxes):
        parts.append(box(index, y, kind, name, detail))
        if index:
            end = LEFT + index * STEP
            middle = y + BOX_HEIGHT // 2
            parts.append(arrow((end - STEP + BOX_WIDTH, middle), (end - 3, middle)))
    return parts


def draw() -> str:
    last = LEFT + 5 * STEP + BOX_WIDTH // 2
    first = LEFT + BOX_WIDTH // 2
    below = REQUEST_Y + BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
        ' font-size="16" stroke-width="1.5">',
        "<title>The path of a model and the path of a request</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
        ' markerHeight="7" orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        *row("Path of a model: build once, publish", MODEL_Y, MODEL_PATH),
        *row("Path of a request: the server", REQUEST_Y, REQUEST_PATH),
        arrow((last, MODEL_Y + BOX_HEIGHT), (last, REQUEST_Y - 3)),
        f'<text class="note" x="{last - 12}" y="{(MODEL_Y + BOX_HEIGHT + REQUEST_Y) // 2 + 5}"'
        ' text-anchor="end" font-size="14">verify, load, golden check, warm up</text>',
        arrow((last, below), (last, below + 38), (first, below + 38), (first, below + 3)),
        f'<text class="note" x="{WIDTH // 2}" y="{below + 60}" text-anchor="middle"'
        ' font-size="14">classes, probabilities, and the time spent in each phase</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (Path(__file__).resolve().parent / "architecture.svg").write_text(draw(), encoding="utf-8")
