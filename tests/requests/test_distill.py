from __future__ import annotations

import pytest

from omgoptim.errors import RequestError
from omgoptim.requests import DistillRequest, parse, techniques
from omgoptim.requests.command import command_of
from omgoptim.requests.distill import STUDENTS, Auto, Depthwise, FewerLayers, Given, student_named


def asked(**arguments: object) -> DistillRequest:
    request = parse("distill", arguments)
    assert isinstance(request, DistillRequest)
    return request


def test_the_teacher_is_the_model_by_either_name() -> None:
    assert asked(teacher="net.py:build") == asked(model="net.py:build")


def test_the_teacher_given_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="'model' and 'teacher'"):
        parse("distill", {"model": "a.py:f", "teacher": "b.py:f"})


def test_a_bare_name_is_a_way_to_derive_and_any_other_text_a_source() -> None:
    assert asked(model="m", student="depthwise").student == Depthwise()
    assert asked(model="m", student="net.py:small").student == Given(source="net.py:small")
    assert asked(model="m", student="distill-20261124-1200-abcd").student == Given(source="distill-20261124-1200-abcd")
    assert asked(model="m").student == Auto()
    assert set(STUDENTS) == set(techniques(DistillRequest))


def test_parameters_of_a_student_stand_beside_the_others() -> None:
    request = asked(model="m", student="net.py:small", student_kwargs={"width": 8}, epochs=3)
    assert request.student == Given(source="net.py:small", student_kwargs={"width": 8})
    assert asked(model="m", student="fewer_layers", keep_layers=3).student == FewerLayers(keep_layers=3)
    assert asked(model="m", keep_layers=3).student == Auto(keep_layers=3)


def test_a_parameter_of_another_student_is_refused_with_whose_it_is() -> None:
    with pytest.raises(RequestError) as refused:
        parse("distill", {"model": "m", "student": "depthwise", "keep_layers": 3})
    assert "auto and fewer_layers" in refused.value.why


def test_two_depths_are_refused() -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        parse("distill", {"model": "m", "student": "fewer_layers", "keep_layers": 3, "depth": 0.5})


@pytest.mark.parametrize(
    ("arguments", "compression"),
    [({}, 4.0), ({"target_compression": 20}, 20.0), ({"keep_layers": 3}, None), ({"target_speedup": 2}, None)],
)
def test_a_compression_is_aimed_at_unless_something_else_decides_the_size(
    arguments: dict[str, object], compression: float | None
) -> None:
    student = asked(model="m", **arguments).student
    assert isinstance(student, Auto)
    assert student.compression == compression


def test_the_command_names_the_student_as_it_was_named() -> None:
    given = asked(model="net.py:build", student="net.py:small", student_checkpoint="s.pt", epochs=20, control=True)
    line = "omgoptim distill net.py:build --student net.py:small --student-checkpoint s.pt --control"
    assert command_of("distill", given) == line.replace(" --student ", " --epochs 20 --student ", 1)
    derived = asked(model="net.py:build", student="depthwise", width=0.5)
    assert command_of("distill", derived) == "omgoptim distill net.py:build --student depthwise --width 0.5"


def test_what_is_no_text_is_left_for_the_request_to_check() -> None:
    assert student_named({"student": "auto"}) == {"student": "auto"}
