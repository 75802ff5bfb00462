"""Every sentence of SECURITY.md's lists has a test that proves it: which one stands here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROOF = {
    "Naming a model, data, a metric or a loss": [
        "trust/test_files.py::test_each_payload_writes_its_mark_when_something_runs_it"
    ],
    "Until you name code": [
        "jobs/test_worker.py::test_a_projects_files_stand_in_for_nothing_that_a_run_imports_before_it_names_code",
        "jobs/test_worker.py::test_what_starts_a_process_of_ours_is_imported_from_python_itself",
    ],
    "Without `--python` or `OMGOPTIM_PYTHON`": ["jobs/test_interpreter.py::test_each_place_comes_before_the_next"],
    "What may be read and whose code may run": [
        "trust/test_artifacts.py::test_what_a_recipe_says_of_its_own_rights_grants_nothing"
    ],
    "Code that is named runs only if": [
        "trust/test_artifacts.py::test_a_callable_that_the_project_does_not_define_is_never_called",
        "trust/test_artifacts.py::test_code_of_an_environment_inside_the_project_is_not_the_projects",
        "trust/test_artifacts.py::test_an_installed_module_runs_where_the_user_allows_it_by_name",
        "trust/test_run_folders.py::test_code_without_a_file_is_not_the_projects_wherever_we_are",
    ],
    "Files are read inside the project": [
        "models/security/test_path_policy.py::test_a_path_outside_the_project_is_refused_even_where_it_exists",
        "models/security/test_path_policy.py::test_a_link_that_leaves_the_project_is_refused_and_an_allowed_folder_is_not",
        "trust/test_run_folders.py::test_a_run_that_is_a_link_gives_no_artifact_from_outside_the_project",
    ],
    "An assistant can give none of": [
        "trust/test_artifacts.py::test_no_tool_takes_what_is_the_users_to_grant",
        "trust/test_artifacts.py::test_an_agent_can_neither_open_a_foreign_artifact_nor_allow_itself_to",
    ],
    "Artifacts are signed (HMAC-SHA256) with a key": [
        "models/security/test_file_integrity.py::test_the_key_is_made_once_and_only_its_user_reads_it"
    ],
    "An artifact that you did not sign": [
        "trust/test_artifacts.py::test_an_artifact_without_this_users_hmac_runs_nothing_unless_it_is_trusted",
        "trust/test_artifacts.py::test_an_artifact_of_another_user_runs_nothing_unless_it_is_trusted",
    ],
    "Trust lets the recipe run": ["trust/test_artifacts.py::test_what_a_recipe_says_of_its_own_rights_grants_nothing"],
    "A program (`model.onnx`) needs no trust": [
        "trust/test_artifacts.py::test_a_program_of_somebody_else_opens_as_it_holds_no_code"
    ],
    "Every file of an artifact is a regular file": [
        "trust/test_artifacts.py::test_one_changed_byte_in_any_file_is_refused",
        "trust/test_artifacts.py::test_a_manifest_names_only_files_inside_its_folder",
        "trust/test_artifacts.py::test_a_link_in_an_artifact_is_refused_and_a_link_to_one_is_not",
        "trust/test_run_folders.py::test_a_recipe_that_was_exchanged_after_its_check_is_not_read",
    ],
    "A run that you did not ask for": [
        "trust/test_artifacts.py::test_a_run_that_this_user_did_not_ask_for_is_resumed_without_what_it_grants_itself",
        "trust/test_tools.py::test_a_run_folder_grants_itself_nothing_when_it_is_resumed",
        "trust/test_run_folders.py::test_a_request_of_other_types_is_resumed_by_nobody",
    ],
    "A report, or a failure, that your own run": [
        "trust/test_foreign_runs.py::test_a_report_of_somebody_elses_run_has_no_commands",
        "trust/test_run_folders.py::test_a_report_that_was_put_beside_a_users_own_request_has_no_commands",
        "trust/test_run_folders.py::test_a_request_and_an_hmac_that_were_copied_make_no_run_a_users_own",
        "trust/test_run_folders.py::test_a_failure_that_was_put_beside_a_users_own_request_has_no_fix",
        "trust/test_run_folders.py::test_a_finalists_report_that_somebody_changed_is_not_picked",
        "operations/test_chained_gains.py::test_a_first_run_whose_report_somebody_changed_gives_no_total",
    ],
    "A folder of runs is only read": [
        "trust/test_run_folders.py::test_a_folder_with_another_name_than_a_runs_is_none",
        "trust/test_run_folders.py::test_a_run_with_a_link_in_its_folder_is_none_and_nothing_is_written_through_it",
        "trust/test_run_folders.py::test_a_pipe_in_a_runs_folder_is_waited_for_by_nobody",
        "trust/test_run_folders.py::test_a_process_that_somebody_elses_run_names_is_not_ended",
    ],
    "Picking another finalist": ["trust/test_foreign_runs.py::test_pick_never_leaves_the_runs_folder"],
    "A `.pt2` file is never handed to torch": [
        "trust/test_files.py::test_a_pt2_file_with_a_pickle_or_compiled_code_is_refused_unopened",
        "trust/test_files.py::test_every_cut_and_flipped_pt2_file_is_opened_or_named",
    ],
    "A program in a `.pt2` file may call": [
        "trust/test_files.py::test_a_pt2_program_whose_text_torch_would_evaluate_is_refused",
        "trust/test_files.py::test_notes_and_guards_of_a_program_are_left_out_and_run_nothing",
        "trust/test_pt2_mutations.py::test_code_in_the_place_of_any_text_of_a_program_is_not_run",
        "trust/test_pt2_mutations.py::test_a_program_with_something_hostile_anywhere_is_opened_without_it_or_named",
    ],
    "A pickled model is never opened": [
        "trust/test_files.py::test_a_pickled_model_is_refused_with_a_way_out_that_is_true",
        "trust/test_files.py::test_a_hostile_checkpoint_is_a_named_error",
    ],
    "The weights that an `.onnx` file keeps outside": [
        "trust/test_files.py::test_an_onnx_file_whose_weights_lie_outside_its_folder_is_refused_by_every_reader",
        "trust/test_files.py::test_no_engine_is_asked_to_load_a_library",
    ],
    "Options of transformers, timm and torchvision": [
        "trust/test_files.py::test_an_option_of_transformers_that_runs_code_is_refused",
        "trust/test_files.py::test_a_name_or_option_of_an_image_library_that_reads_other_files_is_refused",
        "trust/test_files.py::test_the_code_of_a_repository_runs_only_where_the_request_allowed_it",
    ],
    "A Hugging Face folder with a link": [
        "trust/test_files.py::test_a_folder_of_hugging_face_that_leads_elsewhere_is_refused"
    ],
    "A pipe or a device that is named": [
        "trust/test_run_folders.py::test_a_pipe_that_is_named_as_a_model_is_refused_and_not_waited_for"
    ],
    "A target is a host": [
        "requests/test_target.py::test_what_is_no_address_is_refused",
        "requests/test_target.py::test_every_verb_that_measures_takes_a_target_and_refuses_an_option_as_one",
    ],
    "ssh is your own and follows your configuration": [
        "measure/target/test_connection.py::test_ssh_asks_nothing_forwards_nothing_and_takes_no_option_from_the_address",
        "measure/target/test_connection.py::test_a_wrong_key_is_refused_without_a_question",
        "measure/target/test_connection.py::test_an_unknown_host_key_is_refused_and_not_stored",
    ],
    "On a target nothing is written outside": [
        "measure/target/test_client.py::test_what_is_measured_there_is_what_is_measured_here",
        "measure/target/test_client.py::test_a_module_stays_here",
        "measure/target/test_client.py::test_a_lost_connection_is_made_again_and_its_launch_done_again",
    ],
    "An assistant can have your project sent": [
        "jobs/test_ray_job.py::test_an_agent_sends_the_project_only_to_the_head_that_the_user_named"
    ],
    "The server serves only the projects": [
        "trust/test_tools.py::test_only_the_projects_that_the_user_gave_are_served_and_the_line_that_adds_one_is_named",
        "jobs/test_project.py::test_a_home_folder_the_root_and_the_plugins_own_are_no_projects_unless_named",
    ],
    "An assistant names only a Python": ["trust/test_tools.py::test_an_agent_names_only_pythons_that_are_found"],
    "Whatever is asked is answered": [
        "trust/test_tools.py::test_whatever_is_asked_is_answered_in_time_clean_and_never_by_an_internal_error",
        "trust/test_run_folders.py::test_a_state_of_impossible_values_spoils_no_list_of_runs",
        "trust/test_run_folders.py::test_a_report_of_impossible_numbers_is_damaged_and_none_that_cannot_be_shown",
    ],
    "Text from a model, a log, a data set": [
        "trust/test_tools.py::test_a_report_of_hostile_names_is_clean_in_every_answer",
        "test_text.py::test_every_text_of_a_report_is_clean_at_first_when_copied_and_when_read",
        "render/test_inert.py::test_markdown_has_the_same_marks_whatever_things_are_called",
        "render/test_inert.py::test_a_terminal_gets_text_and_colours_and_a_recording_of_it_is_a_picture",
    ],
    "Over HTTP the server binds": [
        "test_server.py::test_http_wants_the_token_a_local_host_and_a_local_origin",
        "trust/test_tools.py::test_over_http_the_same_is_refused",
    ],
}  # fmt: skip
"""The beginning of each sentence, and the tests that prove it, as file::function below tests/."""

IN_SHORT = {
    "A model file runs with your rights": ["Naming a model, data, a metric or a loss"],
    "Only your request and your environment decide": ["What may be read and whose code may run"],
    "A `.pt2` file, checkpoint, `.onnx` file or artifact": [
        "A `.pt2` file is never handed to torch",
        "A pickled model is never opened",
        "The weights that an `.onnx` file keeps outside",
        "An artifact that you did not sign",
    ],
    "In the shell, `--trust-artifact`": [
        "An assistant can give none of",
        "Files are read inside",
        "Trust lets the recipe",
    ],
    "The server only serves": ["The server serves only the projects", "Over HTTP the server binds"],
    "Text from models": ["Text from a model, a log, a data set"],
    "[SECURITY.md]": [],
}
"""The beginning of each sentence of README's Trust, and those of SECURITY.md that it is short for."""


def short_sentences() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Trust\n")[2].partition("\n#")[0]
    return re.split(r"(?<=\.) (?=[A-Z\[])", " ".join(section.split()))


def test_every_sentence_of_the_short_section_is_one_of_the_long_one() -> None:
    said = short_sentences()
    assert [text for text in said if sum(text.startswith(begin) for begin in IN_SHORT) != 1] == []
    assert len(said) == len(IN_SHORT)
    long = [begin for begins in IN_SHORT.values() for begin in begins]
    assert [begin for begin in long if not any(text.startswith(begin) for text in sentences())] == []


def sentences() -> list[str]:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return [" ".join(item.split()) for item in re.findall(r"^- (.+?)(?=^- |^$)", text, re.MULTILINE | re.DOTALL)]


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_sentence_has_a_proof_and_every_proof_a_sentence() -> None:
    said = sentences()
    assert [text for text in said if sum(text.startswith(begin) for begin in PROOF) != 1] == []
    assert [begin for begin in PROOF if not any(text.startswith(begin) for text in said)] == []


def test_every_test_that_proves_a_sentence_exists() -> None:
    named = [test.split("::") for tests in PROOF.values() for test in tests]
    assert [f"{file}::{name}" for file, name in named if name not in functions(file)] == []
