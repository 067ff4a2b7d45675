"""The whole job: collect, plan and rewrite in order, under one lock of the run directory."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flap_stream.config import PlanConfig, PruneConfig, RewriteConfig, part_of
from flap_stream.config.rules import options_of
from flap_stream.engine.membership import joined
from flap_stream.output.carried import tell_left_out
from flap_stream.output.destination import require_own_place
from flap_stream.output.pruning_record import (
    read_record,
)
from flap_stream.progress import Progress
from flap_stream.stages.collect import check_calibration, collect_into
from flap_stream.stages.plan import decide, store_plan
from flap_stream.stages.preparation import calibration_record
from flap_stream.stages.rewrite import PruneResult, progress_weights, require_same_job, rewrite_from
from flap_stream.stages.session import Session, opened_model
from flap_stream.storage import files, places
from flap_stream.storage.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def prune(
    model: str | Path,
    out: str | Path,
    options: PruneConfig | None = None,
    *,
    run: str | Path | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> PruneResult:
    """Prune a model into a checkpoint at `out`; after an interruption, the same call resumes.

    model: a directory or a Hub id. run: the run directory; by default `<out>.run`, which is removed at the end unless
    `options.keep_run` is set; one named here is kept. progress: True shows it on stderr.
    keywords: the fields of `PruneConfig`, in place of `options`.
    Raises InvalidInput (see errors.py) before any long work if the model cannot be pruned as asked.
    """
    options = options_of(PruneConfig, "prune", options, keywords)
    out, progress = Path(out), Progress.of(progress)
    places.require_name(out)
    run_path = Path(run) if run is not None else out.with_name(out.name + ".run")
    removes_run = run is None and not options.keep_run
    with joined() as ranks:
        ranks.from_first(lambda: check_calibration(options, model))
        with opened_model(model, ranks) as source:
            session = Session(source, ranks, progress)
            record = ranks.from_first(lambda: read_record(out))
            if record is None:
                return _run_stages(session, out, options, run_path, removes_run)
            calibration = _known_to(record.get("calibration"), calibration_record(options))
            plan, rewrite = part_of(options, PlanConfig), part_of(options, RewriteConfig)
            require_same_job(source, out, record, plan, rewrite, calibration)
            logger.warning("%s is already complete; nothing to do", out)
            if ranks.is_first:
                files.sync_directory(out.absolute().parent)  # a kill may have come between its rename and this
                if removes_run:
                    RunDirectory.remove_leftover(run_path)
            return PruneResult(out, record, session.measured)


def _run_stages(session: Session, out: Path, options: PruneConfig, run: Path, removes_run: bool) -> PruneResult:
    """Run all stages; the run directory stays locked throughout, so that no other process can plan in between."""
    ranks = session.ranks
    if ranks.is_first:
        require_own_place(session.source, out, run)
        tell_left_out(session.source.directory)
    with ExitStack() as stack:
        stack.enter_context(session.progress.job([("collect", 1.0), *progress_weights(options)]))
        directory, _ = collect_into(session, run, options, stack, out)
        with session.measured.stage("plan"):
            ranks.from_first(lambda: store_plan(directory, decide(directory, part_of(options, PlanConfig), options)))
        committed = directory if ranks.is_first else RunDirectory(run, is_writer=False)  # which has the plan
        rewrite_options = part_of(options, RewriteConfig)
        result = rewrite_from(session, committed, out, rewrite_options, options.snapshot_interval)
        if removes_run and ranks.is_first:
            directory.remove()
    return result


def _known_to(record: Any, calibration: dict[str, Any]) -> dict[str, Any]:
    """A calibration without the fields that a record of an older version lacks."""
    return {name: calibration[name] for name in calibration if not isinstance(record, dict) or name in record}
