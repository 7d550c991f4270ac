"""The evaluation commands of `cnclip`; heavy modules are imported by the command that needs them."""

import argparse
import sys
from typing import Any

EXIT_DONE, EXIT_FAILED = 0, 1


def add_commands(commands: Any) -> None:
    """Add the commands of this module to `argparse`'s sub-parsers."""
    _add_score(commands)
    _add_eval(commands)
    _add_prompts(commands)
    _add_negation(commands)
    _add_index(commands)
    _add_bench_index(commands)
    _add_guard(commands)
    _add_serve(commands)


def _add(commands: Any, name: str, function: object, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=function)
    return command


def _add_score(commands: Any) -> None:
    command = _add(commands, "score", _score, "score a prediction file as the official scorer does")
    command.add_argument("reference", metavar="REFERENCE.jsonl", help="which ids are right for each query")
    command.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="10 ids for each query, best first")
    command.add_argument("out", metavar="OUT.json", help="the score file to write")


def _score(options: argparse.Namespace) -> int:
    from eval.score import score_files

    result = score_files(options.reference, options.predictions, options.out)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if not result.success:
        print(f"error: {result.body['errorMsg']}", file=sys.stderr)
        return EXIT_FAILED
    recalls = result.body["scoreJson"]
    print(
        f"{result.direction.name}: R@1 {recalls['r1']:.2f}  R@5 {recalls['r5']:.2f}"
        f"  R@10 {recalls['r10']:.2f}  mean recall {recalls['mean_recall']:.2f}"
    )
    return EXIT_DONE


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        metavar="RUN-or-CHECKPOINT",
        help="a run's TOML (its last trained stage), or weights of any known format",
    )
    command.add_argument(
        "--vocab",
        dest="vocabulary",
        metavar="PATH-or-ID",
        help="vocab.txt, its folder or a model id (default: the run's, or looked for)",
    )
    command.add_argument(
        "--context-length",
        type=int,
        metavar="N",
        help="tokens with [CLS] and [SEP] (default: the run's, or 52)",
    )


def _add_eval(commands: Any) -> None:
    command = _add(
        commands, "eval", _eval, "measure a model and print ours | paper | difference for every table"
    )
    _add_model(command)
    command.add_argument(
        "--sets", metavar="FOLDER", help="folder of evaluation sets (default: those of the run)"
    )
    command.add_argument(
        "--out", metavar="FOLDER", required=True, help="where features, scores and tables go"
    )
    command.add_argument("--finetuned", action="store_true", help="compare with the paper's finetuned rows")
    command.add_argument(
        "--as", dest="row", metavar="ROW", help="the paper's row to compare with, such as 'CN-CLIP ViT-B/16'"
    )
    command.add_argument(
        "--json-features", action="store_true", help="also write features as CN-CLIP's JSON lines"
    )
    command.add_argument(
        "--ensemble", choices=("features", "scores"), default="features", help="templates: mean of which"
    )
    command.add_argument(
        "--templates", default="own", metavar="own|general|FILE", help="prompts for classification"
    )
    command.add_argument(
        "--format", choices=("text", "json", "csv", "latex"), default="text", help="what is printed"
    )


def _eval(options: argparse.Namespace) -> int:
    from eval.evaluate import Options, evaluate, find_sets, sets_of_run
    from eval.model import find_checkpoint
    from pipeline import store
    from pipeline.records import ConfigError

    checkpoint = find_checkpoint(options.model, options.vocabulary, options.context_length)
    if options.sets is not None:
        sources = find_sets(options.sets)
    elif checkpoint.run_folder is not None:
        sources = sets_of_run(checkpoint.run_folder)
    else:
        raise ConfigError(f"{options.model}: a lone file has no evaluation sets; give --sets FOLDER")
    how = Options(
        setup="finetuned" if options.finetuned else "zero-shot",
        paper_model=options.row,
        ensemble=options.ensemble,
        templates=options.templates,
        json_features=options.json_features,
    )
    evaluate(checkpoint, sources, options.out, how, lambda text: print(text, file=sys.stderr))
    name = {"text": "eval.txt", "json": "eval.json", "csv": "eval.csv", "latex": "eval.tex"}[options.format]
    print(store.read_text(store.join(options.out, name)).rstrip("\n"))
    return EXIT_DONE


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="a classification set in any of the three layouts")
    command.add_argument("--labels", metavar="FILE", help="Chinese class names instead of the set's or ours")
    command.add_argument(
        "--metric",
        choices=("accuracy", "mean-per-class", "roc-auc", "11-point-map"),
        help="default: the set's own in Table 11, else accuracy",
    )


def _open_set(options: argparse.Namespace) -> Any:
    """(the set, its metric) of a command's options."""
    from pathlib import Path

    from eval.datasets.classification import read_classification
    from eval.published import classification_protocol

    protocol = classification_protocol(Path(options.folder).resolve().name)
    metric = options.metric or ("accuracy" if protocol is None else protocol.metric)
    data = read_classification(
        options.folder, labels_path=options.labels, multi_label=metric == "11-point-map"
    )
    return data, metric


def _add_prompts(commands: Any) -> None:
    command = _add(commands, "prompts", _prompts, "each template alone and the ensembles (paper, 3.2.3)")
    _add_model(command)
    _add_set(command)
    command.add_argument("--templates", default="own", metavar="own|FILE", help="the set's own templates")
    command.add_argument("--plot", metavar="OUT.svg", help="draw the scores as well")


def _prompts(options: argparse.Namespace) -> int:
    from eval.analyses import prompt_sensitivity, prompts_plot, prompts_table
    from eval.model import find_checkpoint, load_encoder
    from pipeline import store

    data, metric = _open_set(options)
    encoder = load_encoder(find_checkpoint(options.model, options.vocabulary, options.context_length))
    scores = prompt_sensitivity(encoder, data, metric, own=options.templates)
    print(f"{data.name}, {metric}, {encoder.name}")
    print(prompts_table(scores))
    if options.plot:
        store.write_text(options.plot, prompts_plot(scores, f"{data.name}, {metric}"))
    return EXIT_DONE


def _add_negation(commands: Any) -> None:
    command = _add(commands, "negation", _negation, "a label worded with and without negation (paper, 3.2.3)")
    _add_model(command)
    _add_set(command)
    command.add_argument(
        "--pair",
        action="append",
        nargs=3,
        default=[],
        metavar=("CLASS", "PLAIN", "NEGATED"),
        help="class (number or label) and its two wordings; may be repeated (default: the paper's pairs)",
    )
    command.add_argument("--templates", default="own", metavar="own|general|FILE", help="prompts")


def _negation(options: argparse.Namespace) -> int:
    from eval.analyses import SHIPPED_PAIRS, NegationPair, negation, negation_table
    from eval.labels import templates_for
    from eval.model import find_checkpoint, load_encoder
    from pipeline.records import ConfigError

    data, metric = _open_set(options)
    names = data.labels.names
    pairs = list(SHIPPED_PAIRS.get(data.name, ())) if not options.pair else []
    for which, plain, negated in options.pair:
        row = names.index(which) if which in names else int(which) if which.isdecimal() else -1
        if not 0 <= row < len(names):
            raise ConfigError(
                f"--pair {which}: no class of that label or number; labels: {'、'.join(names[:20])}"
            )
        pairs.append(NegationPair(row, plain, negated))
    if not pairs:
        raise ConfigError(f"{data.name}: no pair ships for this set; give --pair CLASS PLAIN NEGATED")
    encoder = load_encoder(find_checkpoint(options.model, options.vocabulary, options.context_length))
    scores = negation(encoder, data, metric, pairs, templates_for(data.name, options.templates))
    print(f"{data.name}, {metric}, {encoder.name}")
    print(negation_table(scores, names))
    return EXIT_DONE


def _add_embeddings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "embeddings",
        metavar="EMBEDDINGS",
        help="a .npy file, a folder of them, or clip-retrieval's folder with img_emb/ and text_emb/",
    )
    command.add_argument(
        "--side", choices=("image", "text"), default="image", help="of clip-retrieval's folder"
    )
    command.add_argument(
        "--train-rows", type=int, default=262_144, metavar="N", help="evenly spaced rows that FAISS trains on"
    )


def _add_index(commands: Any) -> None:
    command = _add(commands, "index", _index, "build a FAISS index in parts; goes on where it stopped")
    _add_embeddings(command)
    command.add_argument("out", metavar="OUT", help="folder of the index")
    command.add_argument(
        "--factory",
        metavar="STRING",
        help="FAISS's factory string, such as IVF4096,SQ8 (default: suggested from --memory and --recall)",
    )
    _add_target(command)
    command.add_argument(
        "--rows-per-part", type=int, default=500_000, metavar="N", help="rows of one FAISS file"
    )
    command.add_argument(
        "--redo", action="store_true", help="replace an index of other embeddings or settings"
    )


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for the whole index (default: 4)"
    )
    command.add_argument(
        "--recall", type=float, default=0.95, metavar="R", help="wanted against exact search, 0 to 1"
    )


def _index(options: argparse.Namespace) -> int:
    from eval.bench_index import suggest
    from eval.large_index import Embeddings, build_parts
    from pipeline.progress import make_progress

    embeddings = Embeddings.open(options.embeddings, side=options.side)
    factory = options.factory or suggest(
        embeddings.num_rows, embeddings.dim, options.memory * 2**30, options.recall
    )
    index = build_parts(
        embeddings,
        options.out,
        factory=factory,
        rows_per_part=options.rows_per_part,
        train_rows=options.train_rows,
        redo=options.redo,
        progress=make_progress("index", "part"),
    )
    print(
        f"{options.out}: {factory}, {index.num_rows:,} rows of width {index.dim} in {len(index.parts)} parts,"
        f" {index.bytes_per_vector:.1f} bytes a vector"
    )
    return EXIT_DONE


def _add_bench_index(commands: Any) -> None:
    command = _add(
        commands, "bench-index", _bench_index, "recall, speed, build time and size over a grid of indices"
    )
    _add_embeddings(command)
    command.add_argument(
        "--queries", metavar="FILE.npy", help="query features (default: --num-queries rows of the embeddings)"
    )
    command.add_argument(
        "--num-queries", type=int, default=1000, metavar="N", help="queries that are searched"
    )
    command.add_argument("--k", type=int, default=10, metavar="K", help="neighbours asked for")
    command.add_argument(
        "--grid", metavar="STRINGS", help="factory strings with a semicolon between (default: by size)"
    )
    _add_target(command)
    command.add_argument("--out", metavar="FOLDER", help="write points.json and front.svg there")


def _bench_index(options: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    import numpy as np

    from eval import bench_index
    from eval.large_index import Embeddings
    from pipeline import store
    from pipeline.records import ConfigError

    if options.num_queries < 1:
        raise ConfigError(f"--num-queries {options.num_queries}: give at least 1")
    embeddings = Embeddings.open(options.embeddings, side=options.side)
    source = embeddings if options.queries is None else Embeddings.open(options.queries)
    count = min(options.num_queries, source.num_rows)
    queries_QD = source.rows(np.arange(count) * source.num_rows // count)
    grid = (
        options.grid.split(";")
        if options.grid
        else bench_index.default_grid(embeddings.num_rows, embeddings.dim)
    )
    points = bench_index.measure(
        embeddings,
        queries_QD,
        [text.strip() for text in grid if text.strip()],
        k=options.k,
        train_rows=options.train_rows,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(bench_index.points_table(points, options.k))
    per_vector = options.memory * 2**30 / embeddings.num_rows
    best = bench_index.best_point(points, options.recall, per_vector)
    if best is None:
        print(f"none reaches recall {options.recall} within {options.memory} GiB")
    else:
        print(
            f"fastest with recall {options.recall} within {options.memory} GiB:"
            f" {best.factory} {best.parameters}"
        )
    if options.out:
        front = bench_index.pareto_front(points)
        body = [{**asdict(point), "front": point in front} for point in points]
        store.write_text(store.join(options.out, "points.json"), json.dumps(body, indent=1))
        store.write_text(store.join(options.out, "front.svg"), bench_index.front_plot(points, options.k))
    return EXIT_DONE


def _add_guard(commands: Any) -> None:
    command = _add(commands, "guard", _guard, "the list that keeps an evaluation set out of training")
    command.add_argument(
        "evaluation_set",
        metavar="EVALUATION-SET",
        help="NAME_imgs.tsv, a folder with it or with pictures, or a .txt with one picture id a line",
    )
    command.add_argument("--out", required=True, metavar="FILE.parquet", help="the guard to write")
    command.add_argument(
        "--family",
        choices=("coco", "flickr", "own"),
        default="own",
        help="whose picture numbers the ids are; own: ids of no source (default)",
    )


def _guard(options: argparse.Namespace) -> int:
    from data_prep.guard import make_guard

    count = make_guard(options.evaluation_set, options.family, options.out)
    print(f"{options.out}: {count:,} pictures; name it in [corpus] guards")
    return EXIT_DONE


def _add_serve(commands: Any) -> None:
    command = _add(commands, "serve", _serve, "a local page: type a text or drop a picture, see the nearest")
    _add_model(command)
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
        "--pictures", metavar="FOLDER", help="shards or evaluation sets to show (default: the run's)"
    )
    command.add_argument("--parameters", default="", metavar="STRING", help="FAISS's, such as nprobe=16")
    command.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: this machine alone)"
    )
    command.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")


def _serve(options: argparse.Namespace) -> int:
    from eval.gallery import galleries_of_run, open_gallery
    from eval.model import find_checkpoint, load_encoder
    from eval.serve import Searcher, SearchServer
    from pipeline.records import ConfigError

    checkpoint = find_checkpoint(options.model, options.vocabulary, options.context_length)
    if options.index is None:
        for name in ("embeddings", "pictures", "parameters"):
            if getattr(options, name):
                raise ConfigError(f"--{name} goes with --index FOLDER")
        galleries = galleries_of_run(checkpoint, options.model)
    else:
        gallery = open_gallery(
            options.index,
            embeddings_folder=options.embeddings,
            pictures_folder=options.pictures,
            run_folder=checkpoint.run_folder,
            parameters=options.parameters,
        )
        galleries = [gallery]
    searcher = Searcher(load_encoder(checkpoint), galleries)
    with SearchServer(searcher, options.host, options.port) as server:
        for gallery in galleries:
            print(f"{gallery.name}: {gallery.num_rows:,} pictures", file=sys.stderr)
        if not server.is_local:
            print("note: everyone who reaches this address can search and see the pictures", file=sys.stderr)
        print(f"{server.url}  (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    return EXIT_DONE
