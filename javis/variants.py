"""Which model of a checkpoint makes a clip: the teacher, or the student that was distilled from it.

A student makes a clip in a few evaluations of the model and has no unconditional half. It is the default of a
checkpoint that holds one, unless a call asks for what only the teacher does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from javis.errors import UsageError

Variant = Literal["teacher", "student"]
MAX_STUDENT_STEPS = 8  # with more steps than this, and no variant named, the teacher makes the clip

# Arguments of the pipeline that act on the unconditional half, and the values with which they ask for nothing.
UNCONDITIONAL: Mapping[str, tuple[Any, ...]] = {
    "negative_prompt": (None,),
    "audio_negative_prompt": (None,),
    "guidance_interval": (None,),
    "guidance_rescale": (None, 0, 0.0),
    "uncond_every": (None, 1),
}
SCALES = ("guidance", "audio_guidance")


class Choice(NamedTuple):
    """The variant that makes a clip, and why it is the teacher although there is a student."""

    variant: Variant
    because: str | None = None


TEACHER = Choice("teacher")


def choose_variant(
    description: Mapping[str, Any],
    variant: str | None,
    given: Mapping[str, Any],
    *,
    why_no_student: str | None = None,
) -> Choice:
    """Which model makes the clips of one call.

    Args:
        description: of the checkpoint; "student" holds the settings of its student, if it has one.
        variant: "teacher" or "student"; None: the student if there is one and it can do what is asked, unless guidance
            or more than `MAX_STUDENT_STEPS` steps are asked for.
        given: arguments of the call by name; None stands for what was not given.
        why_no_student: a reason that lies in the pipeline and not in the call.

    Raises:
        UsageError: an unknown variant, or a student that is not there or cannot do what is asked.
    """
    if variant is not None and variant not in get_args(Variant):
        raise UsageError(f"unknown variant {variant!r}; expected one of {', '.join(get_args(Variant))}")
    student = description.get("student")
    if student is None:
        if variant == "student":
            raise UsageError("this checkpoint has no student; expected variant 'teacher', or leave it out")
        return TEACHER
    if variant == "teacher":
        return TEACHER
    why_not = why_no_student or _why_not(student, given)
    if variant == "student":
        if why_not is not None:
            raise UsageError(f"the student cannot make this: {why_not}; leave that out, or take variant 'teacher'")
        return Choice("student")
    if why_not is not None:
        return Choice("teacher", why_not)
    for name in SCALES:
        if given.get(name) is not None:
            return Choice("teacher", f"{name} was given")
    steps = given.get("steps")
    if isinstance(steps, int) and steps > MAX_STUDENT_STEPS:
        return Choice("teacher", f"steps are more than {MAX_STUDENT_STEPS}")
    return Choice("student")


def variant_sampling(description: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Sampling defaults of a variant: "sampling" of the checkpoint, or what "student" says of its own."""
    teacher = dict(description["sampling"])
    if variant == "teacher":
        return teacher
    shared = {name: teacher[name] for name in ("order", "timestep_ratio") if name in teacher}
    return shared | {name: value for name, value in description["student"].items() if name != "model"}


def student_config(model: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the student's model configuration: those of the teacher's but for what "model" changes."""
    return dict(model) | dict(student.get("model", {}))


def _why_not(student: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    for name, nothing in UNCONDITIONAL.items():
        value = given.get(name)
        if not any(value is n if n is None else value == n for n in nothing):
            return f"{name} needs the unconditional half of guidance, which it does not have"
    changed = student.get("model", {})
    if not changed.get("guidance_input"):
        for name in SCALES:
            scale = given.get(name)
            if scale is not None and scale != 1:
                return f"{name} {scale} is not 1, and its model does not take guidance as input"
    if given.get("schedule") == "fitted" and "fitted" not in student:
        return "schedule 'fitted' is of the teacher; none was fitted to it"
    if changed.get("step_input"):
        if given.get("solver") not in (None, "euler"):
            return f"solver {given['solver']!r} needs velocities at an instant; it gives means over a step, for 'euler'"
        order = given.get("order") or student.get("order", "together")
        if given.get("audio_steps") is not None and order == "together":
            return "audio_steps beside those of the picture need velocities at an instant; it gives means over a step"
    return None
