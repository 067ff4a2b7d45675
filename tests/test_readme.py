"""The README's tables are what the other tests test."""

from collections.abc import Callable
from pathlib import Path

import pytest
from models import DENSE
from test_bad_input import test_hidden_states_that_overflow_stop_with_their_layer as overflow
from test_bad_input import test_weights_that_are_not_finite_stop_with_their_name as not_finite
from test_campaign import test_a_kill_at_any_file_operation_changes_nothing as killed
from test_campaign import test_a_power_cut_at_any_fsync_changes_nothing as power_cut
from test_export_gguf import WRITTEN
from test_export_stock import ALL_HEADS, FUSED, WITH_BIASES
from test_families import CASES
from test_faults import CORRUPTIONS, FAULTS
from test_faults import test_a_clock_set_back_and_short_reads_and_writes_change_nothing as clock_and_short_io
from test_faults import test_a_file_system_that_cannot_sync_directories_is_warned_of_once as no_sync
from test_faults import test_a_file_system_without_locks_is_named_and_a_run_directory_elsewhere_is_enough as no_locks
from test_faults import test_a_shard_changed_between_two_calls_is_noticed as changed_between
from test_faults import test_a_shard_changed_or_removed_while_in_use_is_noticed as changed_in_use
from test_faults import test_after_an_fsync_that_failed_nothing_more_is_written as fsync_failed
from test_faults import test_no_temporary_folder_is_needed as no_temporary_folder
from test_placement import test_a_device_too_small_for_a_single_window_is_refused as too_small
from test_placement import test_out_of_device_memory_halves_the_batch_and_a_resumed_run_repeats_it as out_of_memory
from test_store import test_a_second_writer_is_refused_until_the_first_is_dead as second_writer

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.export.gguf_architecture import CONVERTIBLE_FROM_STOCK, WITH_QK_NORMS
from flap_stream.model.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODELS, STORAGE = (ROOT / "flap_stream" / room / "README.md" for room in ("model", "storage"))


def gguf_cell(family: str) -> str:
    if family in WITH_QK_NORMS:
        return "one size, no biases"
    if family in WRITTEN:
        return "yes"
    return "through stock" if family in CONVERTIBLE_FROM_STOCK else "no"


GOES_ON, SAME = "reported; rerunning resumes", "nothing changes"
# What happens, the exit code, what becomes of the job, and the test that shows it.
FURTHER = [
    ("SIGKILL at any operation", "", "rerunning resumes", killed),
    ("power cut at any fsync", "", "rerunning resumes", power_cut),
    ("fsync fails", "1", "stops at once, never tries again; rerunning resumes", fsync_failed),
    ("a shard of the model changes or goes while in use", "2", "reported; resumes when restored", changed_in_use),
    ("a shard changes between two calls", "2", "reported, naming the layer; resumes when restored", changed_between),
    ("short reads and writes, the clock set back", "0", SAME, clock_and_short_io),
    ("the temporary folder is gone", "0", SAME, no_temporary_folder),
    ("out of device memory", "0", "halves the batch from there on", out_of_memory),
    ("no memory for a single window", "2", "reported; resumes with more memory", too_small),
    ("NaN or infinity in weights", "2", "names the tensor", not_finite),
    ("hidden states overflow", "2", "names the layer", overflow),
    ("a second job on the run directory", "1", "names the process and host that hold it", second_writer),
    ("no file locks (flock) where the run directory is", "2", "says so; `--run` on another disk is enough", no_locks),
    ("directories cannot be synced", "0", "says so once; only a power cut may take the newest files", no_sync),
]


def faults_table() -> str:
    rows = ["| what happens | exit code | what becomes of the job |", "|---|---|---|"]
    rows += [f"| {name} | {code} | {GOES_ON} |" for name, (_, _, code, _, _) in FAULTS.items()]
    rows += [f"| {name} | {code} | {outcome} |" for name, code, outcome, _ in FURTHER]
    return "\n".join(rows)


def corruptions_table() -> str:
    harms = ("flip", "cut", "delete", "swap")
    rows = ["| file | a bit flipped | cut short | deleted | swapped |", "|---|---|---|---|---|"]
    for name, (_, _, _, outcomes) in CORRUPTIONS.items():
        rows.append(f"| {name} | {' | '.join(outcomes.get(harm, '') for harm in harms)} |")
    return "\n".join(rows)


def stock_cell(family: str) -> str:
    if family not in DENSE:
        return "no" if family in FUSED else "REAP"
    cell = "yes" if family in WITH_BIASES else "no biases"
    return f"{cell}, padded" if family in ALL_HEADS else cell


def table() -> str:
    rows = ["| family | units | GGUF | stock |", "|---|---|---|---|"]
    for family, row in sorted(FAMILIES.items()):
        units = [*(["KV groups"] if row.prunes(Sublayer.ATTENTION) else []), "neurons"]
        each = " of each expert" if row.experts is not None else ""
        rows.append(f"| {family} | {', '.join(units)}{each} | {gguf_cell(family)} | {stock_cell(family)} |")
    return "\n".join(rows)


def short_table() -> str:
    rows = ["| units | families (`model_type` of config.json) |", "|---|---|"]
    for prunes, attention in ((True, "KV groups, "), (False, "")):
        for has_experts, of_what in ((False, ""), (True, " of each expert")):
            names = [
                family
                for family, row in sorted(FAMILIES.items())
                if row.prunes(Sublayer.ATTENTION) is prunes and (row.experts is not None) is has_experts
            ]
            rows.append(f"| {attention}neurons{of_what} | {', '.join(names)} |")
    return "\n".join(rows)


@pytest.mark.parametrize("made", [faults_table, corruptions_table])
def test_the_pages_show_what_was_seen_of_faults(made: Callable[[], str]) -> None:
    assert made() in STORAGE.read_text()


def test_the_readme_and_the_page_of_models_show_the_families() -> None:
    assert set(FAMILIES) <= set(CASES)  # each was pruned, loaded and run
    assert f"models of {len(FAMILIES)} families" in README.read_text()
    assert short_table() in README.read_text() and table() in MODELS.read_text()
