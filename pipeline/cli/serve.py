"""`cnclip serve`."""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from pipeline.cli.app import Group
from pipeline.cli.arguments import (
    EXIT_DONE,
    ContextLength,
    Model,
    Overrides,
    Vocabulary,
    checkpoint,
)
from pipeline.core.records import ConfigError
from pipeline.core.terminal import inform, note

SERVE = Group("Search")


@SERVE.add(
    "serve",
    "serve a local search page for texts and images",
    "my.toml --port 8000",
)
def serve(
    model: Model,
    overrides: Overrides = None,
    vocabulary: Vocabulary = None,
    context_length: ContextLength = None,
    index: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="search this index of cnclip index, or folder with image.index (default: the run's)",
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="read the features' metadata/ here (default: in --index)"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="show images from here: shards, evaluation sets, or the folder that file names start from"
            " (default: the run's, or the working directory)",
        ),
    ] = None,
    pictures: Annotated[str | None, typer.Option("--pictures", hidden=True)] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar="STRING",
            help="search with FAISS's parameters, such as nprobe=16 (default: those the index was tuned to)",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="listen on this address; 127.0.0.1 is for this machine only"),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="listen on this port; 0 picks a free one")] = 8000,
) -> int:
    from eval.features.encoder import load_encoder
    from eval.serve.gallery import galleries_of_run, open_gallery
    from eval.serve.server import Searcher, SearchServer
    from pipeline.core.files.images import DECODES

    images = images if images is not None else pictures
    source = checkpoint(model, overrides, vocabulary, context_length)
    if index is None:
        given = {"embeddings": embeddings, "images": images, "parameters": parameters}
        for name, value in given.items():
            if value:
                raise ConfigError(f"--{name} needs --index FOLDER")
        galleries = galleries_of_run(source, model)
    else:
        gallery = open_gallery(
            index,
            embeddings_folder=embeddings,
            images_folder=images,
            run_folder=source.run_folder,
            parameters=parameters,
        )
        galleries = [gallery]
    # Queries are decoded like the indexed images; a page with two kinds of decoding is refused below.
    known = [
        gallery.model.decode for gallery in galleries if gallery.model is not None and gallery.model.decode
    ]
    if known and known[0] in DECODES:
        source = replace(source, decode=known[0])
    searcher = Searcher(load_encoder(source), galleries)
    with SearchServer(searcher, host, port) as server:
        for gallery in galleries:
            inform(f"{gallery.name}: {gallery.num_rows:,} images")
            if gallery.tuned is not None:
                inform(f"{gallery.name}: {gallery.tuned}")
            if gallery.model is not None and not gallery.model.decode:
                note(
                    f"{gallery.name}: its features do not record how images were decoded; EXIF rotation,"
                    " 16 bits and transparency may differ; embed and index again to be sure"
                )
        if not server.is_local:
            note("anyone who can reach this address can search and see the images")
        print(f"{server.url}  (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return EXIT_DONE
