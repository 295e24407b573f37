"""The files of deploy/ that several tests read."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))


def stage(name: str) -> str:
    """The text of one stage of the Dockerfile."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    (text,) = [text for text in stages if text.splitlines()[0].endswith(f" AS {name}")]
    return text


def copied_sources(text: str) -> list[str]:
    """The sources of all COPY instructions."""
    return [
        source
        for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
