"""Distil emoji-64's second generator to four steps without guidance.

    python assets/build/distill_second.py --work WORK --until 19:30 --guidance 5
    python assets/build/train_second.py --work WORK --evaluate --name second-4-steps --steps 4 --guidance 1

The teacher is WORK/second (train_second.py), with its guidance folded in (arXiv 2210.03142). The student begins as a
copy of it and learns, from one noisy latent, where four guided DDIM steps of the teacher lead: the last round of
progressive distillation (arXiv 2202.00512), taken at once from 16 steps to 4. This was preferred to consistency
distillation (arXiv 2310.04378) because each target is a fixed function of the teacher, not of the student's own
average, so that half an hour on a CPU is stable; and because the student stays a v-prediction model for the same
deterministic scheduler. It is meant for exactly four steps. A killed run resumes from WORK/second-4-steps.ckpt;
WORK/second-4-steps holds the averaged weights, WORK/second-4-steps.jsonl the log.
"""

import argparse
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from train_second import (
    GUIDANCE,
    Batch,
    Data,
    angles,
    broadcast,
    build_pipeline,
    evaluate,
    fit,
    load,
    predict,
)
from training import parse_deadline

SEED, STUDENT_STEPS, TEACHER_STEPS = 4, 4, 16
NAME, RATE, EMA = "second-4-steps", 0.2, 0.99


def trailing(steps: int) -> Tensor:
    """Timesteps (steps + 1,) of DDIMScheduler with trailing spacing, and -1 for the clean latent at the end."""
    return torch.arange(1000, -1, -1000 / steps).round().long() - 1


class Teacher:
    """Guided DDIM of the frozen denoiser, on the angles of its schedule."""

    def __init__(self, transformer: PixArtTransformer2DModel, data: Data, phi: Tensor, guidance: float):
        self.transformer, self.guidance = transformer.requires_grad_(False), guidance
        self.empty_text, self.empty_mask = data.text[:1], data.mask[:1]
        self.phi = torch.cat([phi, torch.zeros(1)])  # index -1: no noise
        self.grid = trailing(TEACHER_STEPS)

    def velocity(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        texts = torch.cat([self.empty_text.expand_as(text), text])
        masks = torch.cat([self.empty_mask.expand_as(mask), mask])
        without, given = predict(self.transformer, x.repeat(2, 1, 1, 1), t.repeat(2), texts, masks).chunk(2)
        return without + self.guidance * (given - without)

    @torch.no_grad()
    def target(self, x: Tensor, segment: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The v (B, 16, 8, 8) whose one DDIM step over ``segment`` (B,), 0 the noisiest, ends where the teacher does.

        A DDIM step turns x by the difference of the angles: x' = cos(d) x - sin(d) v (arXiv 2202.00512, appendix D).
        """
        ratio = TEACHER_STEPS // STUDENT_STEPS
        start = self.phi[self.grid[segment * ratio]]
        y = x
        for k in range(ratio):
            t = self.grid[segment * ratio + k]
            end = self.phi[self.grid[segment * ratio + k + 1]]
            cos, sin = broadcast(self.phi[t] - end)
            y = cos * y - sin * self.velocity(y, t, text, mask)
        cos, sin = broadcast(start - end)
        return (cos * x - y) / sin


def distil(work: Path, deadline: float, guidance: float, steps: int | None) -> None:
    student = load(work / "second")
    pipeline = build_pipeline(student)
    data, phi = Data(pipeline, work), angles(pipeline.scheduler)
    teacher = Teacher(load(work / "second"), data, phi, guidance)
    starts = trailing(STUDENT_STEPS)

    def loss(transformer: PixArtTransformer2DModel, batch: Batch) -> Tensor:
        segment = torch.arange(len(batch.rows)) % STUDENT_STEPS
        t = starts[segment]
        cos, sin = broadcast(phi[t])
        x = cos * batch.x + sin * torch.randn(batch.x.shape, generator=batch.generator)
        target = teacher.target(x, segment, batch.text, batch.mask)
        return functional.mse_loss(predict(transformer, x, t, batch.text, batch.mask), target)

    @torch.no_grad()
    def measure(average: PixArtTransformer2DModel) -> dict:
        held_out = round(loss(average, data.held_out()).item(), 5)
        return {"validation": held_out, "teacher_guidance": guidance, **evaluate(average, STUDENT_STEPS, 1.0)}

    def losses_of(step: int) -> dict[str, Tensor]:
        return {"loss": loss(student, data.batch(SEED, step))}

    model = nn.ModuleDict({"transformer": student})
    options = {"rate": RATE, "warm_up": 50, "decay_from": 0.4, "ema": EMA, "steps": steps}
    fit(NAME, model, losses_of, measure, work, deadline, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that train_second.py wrote to")
    parser.add_argument("--until", type=parse_deadline, required=True, help="time of day to stop at, HH:MM")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="the teacher's; the student needs none")
    parser.add_argument("--max-steps", type=int, help="stop after this many training steps, for trials")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    distil(args.work, args.until, args.guidance, args.max_steps)


if __name__ == "__main__":
    main()
