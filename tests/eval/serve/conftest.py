"""The site that all tests of this folder ask."""

import threading
from collections.abc import Iterator

import pytest

from eval.features.encoder import find_checkpoint, load_encoder
from eval.index.partitioned import Embeddings, build_parts
from eval.serve.gallery import galleries_of_run, open_gallery
from eval.serve.server import Searcher, SearchServer
from tests.helpers.search_site import Site, embed_shards, write_run, write_shards


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("serve")
    write_run(folder)
    write_shards(folder / "run" / "shards")
    recipe = folder / "run.toml"
    recipe.write_text(f'[run]\nfolder = "{folder}/run"\n[model]\nname = "tiny-vit"\n', encoding="utf-8")
    checkpoint = find_checkpoint(str(recipe), None, None)
    encoder = load_encoder(checkpoint)
    embed_shards(encoder, folder / "features")
    embeddings = Embeddings.open(str(folder / "features"))
    build_parts(embeddings, str(folder / "shards.index"), factory="Flat", rows_per_part=5, train_rows=14)
    of_shards = open_gallery(
        str(folder / "shards.index"),
        embeddings_folder=str(folder / "features"),
        run_folder=checkpoint.run_folder,
    )
    galleries = (*galleries_of_run(checkpoint, str(recipe)), of_shards)
    with SearchServer(Searcher(encoder, galleries), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Site(folder, recipe, checkpoint, encoder, galleries, server)
        server.shutdown()
        thread.join()
