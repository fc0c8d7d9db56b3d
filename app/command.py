"""``visearch app``: serve the page, to this machine alone unless told otherwise."""

from __future__ import annotations

import argparse
import ipaddress
from pathlib import Path
from typing import Any

from visearch.app.frames import Limits
from visearch.options import add_command

__all__ = ["add_parser"]

EXAMPLES = """
examples:
  visearch app
      the embedded models, at http://127.0.0.1:7860, for this machine alone; needs no network
  visearch app --open --max-images 32
      opens the browser; a search may take at most 32 images of work
  visearch app --model stabilityai/stable-diffusion-xl-base-1.0 --reward open-clip:ViT-H-14/laion2b_s32b_b79k
      any diffusers pipeline by hub id or folder, beside the embedded ones; the page itself never names one
  visearch app --host 0.0.0.0 --auth users.txt
      for the local network, to those whose user:password is a line of users.txt
  visearch app --share --auth users.txt
      by a public link, through Gradio's tunnel
  visearch app --geneval outputs/best --geneval outputs/once
      browse results of `visearch geneval`, a search beside its baseline
"""


def add_parser(commands: Any) -> None:
    """Add the command to what ``add_subparsers`` gave."""
    parser = add_command(
        commands,
        "app",
        _app,
        help="a page in the browser: one sample and a search side by side, live",
        description="Serves a page on which searches are set, watched, compared and taken home as code. It listens on "
        "this machine alone and loads nothing from elsewhere. Models and results are named here, never on the page.",
        examples=EXAMPLES,
    )
    offer = parser.add_argument_group("what it offers")
    several = {"action": "append", "default": []}
    offer.add_argument("--model", **several, metavar="PATH|HUB_ID", help="a further diffusers pipeline; repeatable")
    offer.add_argument(
        "--reward", **several, metavar="NAME", help="a further reward that may guide, as of visearch run; repeatable"
    )
    offer.add_argument(
        "--geneval", **several, type=Path, metavar="DIR", help="results of visearch geneval to browse; repeatable"
    )
    offer.add_argument(
        "--max-images", type=int, metavar="N", help=f"most images of one search (default {Limits.images})"
    )
    offer.add_argument(
        "--max-seconds", type=float, metavar="S", help=f"most seconds of one search (default {Limits.seconds:g})"
    )
    reach = parser.add_argument_group("who reaches it")
    reach.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default %(default)s)")
    reach.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    reach.add_argument("--share", action="store_true", help="a public link, too, through Gradio's tunnel")
    reach.add_argument(
        "--auth",
        metavar="USER:PASSWORD|FILE",
        help="who may enter; a file with one user:password a line keeps them out of the list of processes",
    )
    reach.add_argument("--no-auth", action="store_true", help="let anyone who reaches --host or --share enter")
    reach.add_argument("--open", action="store_true", help="open the browser")


def _app(options: argparse.Namespace) -> int:
    auth = _check(options)
    from visearch.app.page import launch
    from visearch.app.studio import GUIDES, MODELS, Source, Studio

    given = {"images": options.max_images, "seconds": options.max_seconds}
    studio = Studio(
        models={name: Source(name) for name in options.model} | MODELS,
        rewards=[*dict.fromkeys((*options.reward, *GUIDES))],
        limits=Limits(**{name: value for name, value in given.items() if value is not None}),
    )
    launch(
        studio,
        options.geneval,
        host=options.host,
        port=options.port,
        share=options.share,
        auth=auth,
        inbrowser=options.open,
    )
    return 0


def _check(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Who may enter.

    Raises:
        ValueError: a limit or port out of range, or a page that others reach and nobody guards.
    """
    for name in ("max_images", "max_seconds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.port is not None and not 0 < options.port < 65536:
        raise ValueError(f"--port {options.port} must lie in [1, 65535]")
    open_to = "--share" if options.share else "" if _loopback(options.host) else f"--host {options.host}"
    if open_to and not options.auth and not options.no_auth:
        raise ValueError(
            f"{open_to} lets others in; give --auth USER:PASSWORD or a file of them, or --no-auth if anyone may enter"
        )
    return _users(options.auth) if options.auth else []


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _users(text: str) -> list[tuple[str, str]]:
    lines = Path(text).read_text(encoding="utf-8").splitlines() if Path(text).is_file() else [text]
    pairs = [line.strip().partition(":") for line in lines if line.strip()]
    if not pairs or not all(user and password for user, _, password in pairs):
        raise ValueError("--auth wants USER:PASSWORD, or a file with one such line a user")
    return [(user, password) for user, _, password in pairs]
