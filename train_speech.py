"""Speech Commands v0.02: one second of speech, one word of 35, a stretch of sound a token.

    python train_speech.py --pretrained 0                   # frozen random GPT-2 on log-mel frames
    python train_speech.py --pretrained 0 --tokens wave     # 80 raw samples at 8 kHz a token, as the original
    python train_speech.py --pretrained 0 --demo 1          # no network, about a minute
    python train_speech.py --eval runs/speech/best.pt --predict clip.wav
"""
import torch
import torch.nn.functional as F
import torchaudio

import data
import fpt


def main():
    parser = fpt.flags(
        "speech", __doc__,
        steps=1500, batch_size=32,
        lr=3e-3, ln_lr=4.0,
        random_layers=2, pool="cls",        # two random blocks and an empty token that reads: better than twelve, in a sixth of the time
        init_std=0.08, in_gain=0.3,         # at GPT-2's own 0.02 and 1.41 random blocks add little to the tokens
        eval_every=250, eval_examples=1000,
    )
    parser.add_argument("--tokens", choices=["mel", "wave"], default="mel", help="mel: 51 frames of 80 log-mel energies, one every 20 ms; wave: 100 stretches of 80 samples at 8 kHz")
    parser.add_argument("--augment", type=int, choices=[0, 1], default=1, help="1: shift training clips by up to 100 ms")
    args = fpt.parse(parser, demo=dict(steps=40, eval_every=20, batch_size=16))

    if args.tokens == "mel":
        spectrogram = torchaudio.transforms.MelSpectrogram(data.SPEECH_RATE, n_fft=1024, win_length=640, hop_length=320, n_mels=80).to(args.device)

        def to_features(waves):
            return (spectrogram(waves) + 1e-6).log().transpose(1, 2)
    else:
        resample = torchaudio.transforms.Resample(data.SPEECH_RATE, 8000).to(args.device)

        def to_features(waves):
            return resample(waves).unflatten(1, (100, 80))

    def to_tokens(waves):  # each clip with mean 0 and standard deviation 1: how loud it is does not tell the word
        features = to_features(waves / 32768)
        return F.layer_norm(features, features.shape[1:])

    if args.predict:
        samples = torch.from_numpy(data.read_wav(args.predict)[:data.SPEECH_RATE].copy()).to(args.device)
        wave = F.pad(samples, (0, data.SPEECH_RATE - len(samples)))[None]
        return fpt.print_prediction(args, fpt.FPT(args, inputs=80, outputs=len(args.classes)), args.classes, to_tokens(wave))

    sets = data.speech_commands(args.data, args.demo)
    args.classes = sets.pop("classes")  # a checkpoint keeps the flags, and with them the words
    splits = {split: (waves.to(args.device), labels.to(args.device)) for split, (waves, labels) in sets.items()}

    def batch(split, index):
        waves, labels = splits[split]
        index = index.to(args.device, non_blocking=True)
        waves = waves[index]
        if split == "train" and args.augment:
            waves = shift(waves, data.SPEECH_RATE // 10)
        return to_tokens(waves), None, labels[index]

    model = fpt.FPT(args, inputs=80, outputs=len(args.classes))
    sizes = {split: len(labels) for split, (_, labels) in splits.items()}
    return fpt.fit(args, model, batch, sizes, dummy=splits["train"][1].mode().values.item())


def shift(waves, most):
    """Each clip [batch, samples] earlier or later by up to `most` samples, what leaves at one end coming in at the other:
    digital silence instead would mark every training clip, and no test clip has it."""
    count, samples = waves.shape
    start = torch.randint(-most, most + 1, (count, 1), device=waves.device)
    return waves.gather(1, (start + torch.arange(samples, device=waves.device)) % samples)


if __name__ == "__main__":
    fpt.run(main)
