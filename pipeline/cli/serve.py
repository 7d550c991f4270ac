"""`cnclip serve`."""

import argparse
import sys
from dataclasses import replace
from typing import Any

from pipeline.cli.arguments import EXIT_DONE, add, add_model, checkpoint
from pipeline.core.records import ConfigError


def add_commands(commands: Any) -> None:
    """Add the command to `argparse`'s sub-parsers."""
    command = add(
        commands,
        "serve",
        _serve,
        "serve a local page: type a text or drop an image, see the nearest",
        "my_run.toml --port 8000",
    )
    add_model(command)
    command.add_argument(
        "--index",
        metavar="FOLDER",
        help="of `cnclip index`, or one with image.index (default: those of the run's index stage)",
    )
    command.add_argument(
        "--embeddings",
        metavar="FOLDER",
        help="what was indexed, with metadata/ (default: the index's folder)",
    )
    command.add_argument(
        "--images",
        metavar="FOLDER",
        help="shards, evaluation sets, or what file names are relative to (default: the run's, or here)",
    )
    command.add_argument("--pictures", dest="images", help=argparse.SUPPRESS)
    command.add_argument("--parameters", default="", metavar="STRING", help="FAISS's, such as nprobe=16")
    command.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: this machine only)"
    )
    command.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")


def _serve(options: argparse.Namespace) -> int:
    from eval.features.encoder import load_encoder
    from eval.serve.gallery import galleries_of_run, open_gallery
    from eval.serve.server import Searcher, SearchServer
    from pipeline.core.files.images import DECODES

    model = checkpoint(options)
    if options.index is None:
        for name in ("embeddings", "images", "parameters"):
            if getattr(options, name):
                raise ConfigError(f"--{name} goes with --index FOLDER")
        galleries = galleries_of_run(model, options.model)
    else:
        gallery = open_gallery(
            options.index,
            embeddings_folder=options.embeddings,
            images_folder=options.images,
            run_folder=model.run_folder,
            parameters=options.parameters,
        )
        galleries = [gallery]
    # A query is decoded as the images that it is compared with: two ways in one page are refused below.
    known = [
        gallery.model.decode for gallery in galleries if gallery.model is not None and gallery.model.decode
    ]
    if known and known[0] in DECODES:
        model = replace(model, decode=known[0])
    searcher = Searcher(load_encoder(model), galleries)
    with SearchServer(searcher, options.host, options.port) as server:
        for gallery in galleries:
            print(f"{gallery.name}: {gallery.num_rows:,} images", file=sys.stderr)
            if gallery.model is not None and not gallery.model.decode:
                print(
                    f"note: {gallery.name}: its features do not say how images were decoded: what EXIF turns,"
                    " 16 bits and transparency may look otherwise there; embed and index again to be sure",
                    file=sys.stderr,
                )
        if not server.is_local:
            print("note: everyone who reaches this address can search and see the images", file=sys.stderr)
        print(f"{server.url}  (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return EXIT_DONE
