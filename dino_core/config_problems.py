"""Points of the component space that compute nothing sensible, each with the reason. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_core.config import PretrainConfig


def combination_problems(config: PretrainConfig) -> list[str]:
    """Points of the component space that compute nothing sensible, each with the reason."""
    loss, teacher = config.loss.name, config.teacher
    problems = []
    if loss == "cross_entropy" and config.head.num_prototypes is None:
        problems.append("head.num_prototypes = None: must be >= 2 with loss.name = cross_entropy, a softmax over them")
    if loss != "cross_entropy":
        if teacher.centering in ("softmax", "sinkhorn_knopp"):
            problems.append(
                f"teacher.centering = {teacher.centering}: gives probabilities, which only loss.name = "
                f"cross_entropy compares; must be center or none with {loss}"
            )
        if teacher.sharpening != "softmax":
            problems.append(
                f"teacher.sharpening = {teacher.sharpening}: must be softmax, its default, with loss.name = "
                f"{loss}, which compares outputs and sharpens nothing"
            )
    if loss == "info_nce" and teacher.centering == "center":
        problems.append(
            "teacher.centering = center: must be none with loss.name = info_nce, which compares only differences "
            "between images; a centre that moves would make outputs of different steps incomparable"
        )
    if loss == "info_nce" and config.loss.queue_size is None and config.batch_size < 2:
        problems.append("batch_size = 1: must be >= 2 with loss.name = info_nce, whose negatives are the other images")
    if config.ibot.weight:
        problems += _patch_problems(config)
    elif not config.loss.weight:
        problems.append("loss.weight = 0: must be > 0 with pretrain.ibot.weight = 0, or there is nothing to learn")
    if not config.loss.weight:
        problems += _no_class_loss_problems(config)
    if config.loss.koleo_weight:
        problems += _koleo_problems(config)
    if teacher.checkpoint is not None:
        problems += _distillation_problems(config)
    if not teacher.stop_gradient:
        problems += _two_sided_problems(config)
    problems += depth_group_problems(config, 1)
    if config.parallel_strategy == "fsdp" and config.model.compile:
        problems.append(
            "parallel_strategy = fsdp: must be ddp with pretrain.model.compile = true, which compiles the backbone in "
            "one piece, while its blocks are gathered one by one"
        )
    if teacher.mode == "eval" and not teacher.ema_buffers and _has_batch_norm_in_heads(config):
        problems.append(
            "teacher.mode = eval: needs pretrain.teacher.ema_buffers = true with batch norm in the head, or the "
            "running statistics that it reads never move"
        )
    return problems


def _patch_problems(config: PretrainConfig) -> list[str]:
    """Why patches cannot be distilled."""
    ibot, mask = config.ibot, config.mask
    problems = []
    if config.loss.name != "cross_entropy":
        problems.append(
            f"ibot.weight = {ibot.weight:g}: must be 0 with pretrain.loss.name = {config.loss.name}; patches are "
            "compared by cross_entropy over prototypes"
        )
    if config.predictor.num_layers:
        problems.append(
            f"ibot.weight = {ibot.weight:g}: must be 0 with a predictor (pretrain.predictor.num_layers = "
            f"{config.predictor.num_layers}), which patches do not have"
        )
    of_class = {"shared": ("num_prototypes", "bottleneck_dim"), "shared_mlp": ("bottleneck_dim",), "untied": ()}
    problems += [
        f"ibot.{name} = {getattr(ibot, name)}: must be none with pretrain.ibot.head = {ibot.head}, that of "
        "pretrain.head"
        for name in of_class[ibot.head]
        if getattr(ibot, name) is not None
    ]
    if ibot.patches == "all" and ibot.class_view == "full":
        problems.append("ibot.class_view = full: must be masked with pretrain.ibot.patches = all, which masks nothing")
    if ibot.patches == "masked" and mask.sampler == "dinov2" and int(2 * config.batch_size * mask.prob) < 1:
        problems.append(
            f"mask.prob = {mask.prob:g}: masks none of the {2 * config.batch_size} global crops of a step; must be at "
            f"least {1 / (2 * config.batch_size):g} with pretrain.mask.sampler = dinov2"
        )
    return problems


def _no_class_loss_problems(config: PretrainConfig) -> list[str]:
    """What only serves the loss of the class token, which is switched off."""
    problems = []
    if config.crops.num_local_crops:
        problems.append(
            f"crops.num_local_crops = {config.crops.num_local_crops}: must be 0 with pretrain.loss.weight = 0; only "
            "the loss of the class token compares local crops"
        )
    if config.ibot.head != "shared":
        problems.append(
            f"ibot.head = {config.ibot.head}: must be shared with pretrain.loss.weight = 0, where there is no other "
            "head"
        )
    if config.ibot.class_view == "full":
        problems.append(
            "ibot.class_view = full: must be masked with pretrain.loss.weight = 0, which uses no class token"
        )
    return problems


def _koleo_problems(config: PretrainConfig) -> list[str]:
    """Which neighbours KoLeo cannot have."""
    size, part = config.loss.koleo_group_size, config.batch_size // config.accumulate_steps
    problems = []
    if size is None and config.batch_size < 2:
        problems.append("batch_size = 1: must be >= 2 with pretrain.loss.koleo_weight > 0, a loss of neighbours")
    if size is not None and config.batch_size % size:
        problems.append(f"loss.koleo_group_size = {size}: must divide pretrain.batch_size = {config.batch_size}")
    elif config.accumulate_steps > 1 and (size is None or part % size):
        problems.append(
            f"loss.koleo_group_size = {size}: must divide the {part} images of each of pretrain.accumulate_steps = "
            f"{config.accumulate_steps} parts; the gradient through the neighbours needs them at once"
        )
    return problems


def depth_group_problems(config: PretrainConfig, num_workers: int) -> list[str]:
    """Why the groups of images among which `drop_path_mode = sub_batch` chooses are not whole in each pass."""
    model, num_parts = config.model, num_workers * config.accumulate_steps
    size, part = model.drop_path_group_size, config.batch_size // num_parts
    if model.drop_path_mode != "sub_batch" or (num_parts == 1 if size is None else part % size == 0):
        return []
    workers = f" of {num_workers} workers" * (num_workers > 1)
    return [
        f"model.drop_path_group_size = {size}: must divide {part}, the images of each pass{workers}"
        f" (pretrain.accumulate_steps = {config.accumulate_steps}), with pretrain.model.drop_path_mode = sub_batch"
    ]


def _distillation_problems(config: PretrainConfig) -> list[str]:
    """What a frozen teacher leaves no room for."""
    teacher = config.teacher
    problems = []
    if teacher.update != "ema":
        problems.append(
            f"teacher.update = {teacher.update}: must be ema with pretrain.teacher.checkpoint, whose teacher is "
            "frozen; the average of the student is what is kept"
        )
    if not teacher.ema_buffers and _has_batch_norm_in_heads(config):
        problems.append(
            "teacher.ema_buffers = False: must be true with pretrain.teacher.checkpoint and batch norm in the head; "
            "the average of the student sees no crops by which its running statistics would move"
        )
    return problems


def _two_sided_problems(config: PretrainConfig) -> list[str]:
    """Why a gradient through the teacher's side is not possible."""
    problems = []
    if config.teacher.update != "student_copy":
        problems.append(
            f"teacher.stop_gradient = False: needs pretrain.teacher.update = student_copy, not "
            f"{config.teacher.update}, whose weights are not the student's"
        )
    if config.loss.name != "info_nce":
        problems.append(
            f"teacher.stop_gradient = False: must be true with loss.name = {config.loss.name}; without negatives "
            "both sides would agree on a constant"
        )
    if config.loss.queue_size is not None:
        problems.append("teacher.stop_gradient = False: must be true with a queue, whose outputs have no gradient")
    if config.accumulate_steps > 1:
        problems.append(
            "teacher.stop_gradient = False: must be true with pretrain.accumulate_steps > 1; the gradient through "
            "the negatives needs the whole batch at once"
        )
    if config.teacher.mode == "eval":
        problems.append("teacher.stop_gradient = False: needs pretrain.teacher.mode = train, as the student is")
    if config.predictor.num_layers:
        problems.append("teacher.stop_gradient = False: must be true with a predictor, which has two unlike sides")
    return problems


def _has_batch_norm_in_heads(config: PretrainConfig) -> bool:
    return (config.head.batch_norm and config.head.num_layers > 1) or config.head.output_batch_norm
