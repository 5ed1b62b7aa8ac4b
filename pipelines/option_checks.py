"""Whether options of a command fit each other; what does not is wrong usage."""

import argparse

# What says how the factors of training examples are computed, and those of queries.
_OF_EXAMPLES = (
    *("examples", "layers", "precision", "max_bad_examples"),
    *("loss", "learning_rates", "model_output"),
)
_OF_MODELS = (
    *("checkpoints", "model", "imports", "allow_unsafe_model", "batch_size", "xla"),
    *("parse", "preprocess"),
)


def _flag(name: str) -> str:
    return "--import" if name == "imports" else f"--{name.replace('_', '-')}"


def check_workers(options: argparse.Namespace) -> str | None:
    """Returns what is wrong with the options about workers, or None."""
    if (options.worker_kind is None) != (options.worker_kinds is None):
        return "expected both --worker-kind and --worker-kinds, or neither"
    if options.worker_kind is not None and options.workers is None:
        return "--worker-kind: expected --workers, too"
    if options.workers is not None and not (options.dry_run or options.command == "plan"):
        return "--workers is for a plan: expected --dry-run, too; a job's own are Beam's"
    return None


def check_job(options: argparse.Namespace) -> str | None:
    """Returns what is wrong with the options of a job over examples or a store, or None."""
    if problem := _check_rescoring(options):
        return problem
    if options.store is None:
        missing = [f"--{n}" for n in ("checkpoints", "examples") if getattr(options, n) is None]
        return f"expected {missing[0]}, or --store" if missing else check_workers(options)
    queries = getattr(options, "queries", None)
    if queries is None and (options.dry_run or options.command == "plan"):
        return (
            "a plan for --store: expected --queries; self-influence reads sidecars alone, which "
            "takes seconds"
        )
    ignored = [*_OF_EXAMPLES]
    if queries is None or queries.startswith("store:"):
        ignored += _OF_MODELS
    taken = [_flag(name) for name in ignored if getattr(options, name)]
    if taken:
        return f"{taken[0]} says how gradient factors are computed, but those of --store are"
    return check_workers(options)


def _check_rescoring(options: argparse.Namespace) -> str | None:
    """Returns what is wrong with the options about sketches and rescoring, or None."""
    queries, rescore, shortlist = (
        getattr(options, name, None) for name in ("queries", "rescore", "shortlist")
    )
    if queries is not None and getattr(options, "sketch", None) is not None:
        return "--sketch is for a plan of 'tracin extract', --queries for one of 'tracin influence'"
    if rescore is not None and (options.store is None or queries is None):
        return "--rescore: expected --queries and --store, a store of sketches"
    if shortlist is not None and rescore is None:
        return "--shortlist: expected --rescore, the store whose factors it is scored with"
    if shortlist is not None and shortlist < options.k:
        return f"--shortlist {shortlist}: expected at least --k, {options.k}"
    return None
