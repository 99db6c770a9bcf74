"""Train the small demo networks on Fashion-MNIST and export them to ONNX.

Batch normalization is kept in the files: each convolution is followed by its own `BatchNormalization` node
in inference mode, so every pass that needs its statistics has them. In the DenseNet it stands in front of
the convolutions, as published.

Images are N x 1 x 28 x 28 float32; `normalize` is done outside of the network.
"""

import gzip
import math
import time
from collections import OrderedDict
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional

Images = npt.NDArray[np.uint8]  # N x 28 x 28 x 1
Labels = npt.NDArray[np.uint8]  # N

CLASSES = 10
MEAN, STD = 0.2860, 0.3530  # of the training pixels, divided by 255
PREPROCESSING = f"mean={MEAN:.4f} std={STD:.4f} size=28 layout=nchw"
OPSET = 17
BATCH = 128
MAX_LR, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4
SUBSETS = {"fashion-tiny": ("train", 50), "fashion-test2k": ("t10k", 200)}  # images a class


# --- data -------------------------------------------------------------------------------------


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped idx file of unsigned bytes: 0 0 8 rank, big-endian sizes, data."""
    with gzip.open(path) as file:
        raw = file.read()
    if raw[:3] != b"\x00\x00\x08":
        raise click.ClickException(f"{path}: not an idx file of bytes (begins with {raw[:3]!r})")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_split(data: Path, split: str) -> tuple[Images, Labels]:
    """Images and labels of `train` (60,000) or `t10k` (10,000)."""
    images = read_idx(data / f"{split}-images-idx3-ubyte.gz")
    return images[..., None], read_idx(data / f"{split}-labels-idx1-ubyte.gz")


def normalize(images: Images) -> npt.NDArray[np.float32]:
    """N x 28 x 28 x 1 bytes to the N x 1 x 28 x 28 input of the networks."""
    x = (images.astype(np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32)


def write_subsets(data: Path, out: Path, seed: int) -> None:
    """Write class-balanced, shuffled samples of the training and test sets."""
    for name, (split, per_class) in SUBSETS.items():
        x, y = load_split(data, split)
        rng = np.random.default_rng(seed)
        of_class = [np.flatnonzero(y == label) for label in range(CLASSES)]
        chosen = [rng.choice(indices, per_class, replace=False) for indices in of_class]
        index = rng.permutation(np.concatenate(chosen))
        np.savez_compressed(out / f"{name}.npz", x=x[index], y=y[index])
        click.echo(f"{name}.npz: {len(index)} images")


# --- networks ---------------------------------------------------------------------------------


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution without bias, then batch normalization."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum (He et al. 2015).

    The shortcut is the identity, or a 1x1 convolution where the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = conv_bn(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """N x `inputs` x H x W to N x `outputs` x H / `stride` x W / `stride`."""
        branch = self.conv2(self.relu(self.conv1(x)))
        return torch.relu(branch + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (3x3), project (1x1, linear) (Sandler et al. 2018).

    The input is added where the shape stays the same.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(conv_bn(inputs, hidden, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6())
        self.project = conv_bn(hidden, outputs, 1)
        self.identity = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """N x `inputs` x H x W to N x `outputs` x H / `stride` x W / `stride`."""
        branch: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + branch if self.identity else branch


class DenseLayer(nn.Module):
    """Batch normalization, ReLU, 3x3 convolution; what it gives stands behind its input.

    With a bottleneck, as in DenseNet-BC, a 1x1 convolution to that many channels stands in front of the
    3x3 one, with a normalization and a ReLU of its own (Huang et al. 2017).
    """

    def __init__(self, inputs: int, growth: int, bottleneck: int = 0) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.squeeze = (
            nn.Sequential(conv_bn(inputs, bottleneck, 1), nn.ReLU()) if bottleneck else nn.Identity()
        )
        self.conv = nn.Conv2d(bottleneck or inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """N x `inputs` x H x W to N x (`inputs` + `growth`) x H x W."""
        return torch.cat([x, self.conv(self.squeeze(torch.relu(self.bn(x))))], 1)


class Transition(nn.Sequential):
    """Batch normalization, ReLU, 1x1 convolution, average pooling by 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), conv, nn.AvgPool2d(2))


class Network(nn.Module):
    """Stem, blocks, global average pooling, linear classifier."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """N x 1 x 28 x 28 normalized images to N x 10 logits."""
        logits: Tensor = self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return logits


def resnet20() -> Network:
    """CIFAR-style ResNet: 3 stages of 3 basic blocks, at 28, 14 and 7 pixels."""
    channels, blocks = 16, list[nn.Module]()
    stem = nn.Sequential(conv_bn(1, channels, 3), nn.ReLU())
    for width, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, 1, 1):
            blocks.append(BasicBlock(channels, width, stride))
            channels = width
    return Network(stem, blocks, channels)


def mobilenetv2() -> Network:
    """Small MobileNetV2: 10 inverted residuals, 8 of them with the identity, at 14, 7 and 4."""
    channels, blocks = 24, list[nn.Module]()
    stem = nn.Sequential(conv_bn(1, channels, 3, stride=2), nn.ReLU6())
    for width, count, first_stride in ((24, 3, 1), (40, 4, 2), (64, 3, 2)):
        for stride in (first_stride, *[1] * (count - 1)):
            blocks.append(InvertedResidual(channels, width, stride, expansion=4))
            channels = width
    head = nn.Sequential(conv_bn(channels, 4 * channels, 1), nn.ReLU6())
    return Network(stem, [*blocks, head], 4 * channels)


def vgg() -> Network:
    """Small VGG: 3x3 convolutions one after the other, at 28, 14 and 7 pixels, no shortcut."""
    channels, blocks = 32, list[nn.Module]()
    for width in (48, 96):
        blocks.append(nn.MaxPool2d(2))
        for _ in range(2):
            blocks.append(nn.Sequential(conv_bn(channels, width, 3), nn.ReLU()))
            channels = width
    return Network(nn.Sequential(conv_bn(1, 32, 3), nn.ReLU()), blocks, channels)


def densenet(bottleneck: int = 0) -> Network:
    """Small DenseNet: 3 dense blocks of 4 layers with growth 16, at 14, 7 and 3 pixels."""
    channels, growth, blocks = 32, 16, list[nn.Module]()
    for block in range(3):
        if block:
            blocks.append(Transition(channels, channels // 2))
            channels //= 2
        for _ in range(4):
            blocks.append(DenseLayer(channels, growth, bottleneck))
            channels += growth
    blocks.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()))
    return Network(nn.Conv2d(1, 32, 3, 2, 1, bias=False), blocks, channels)


def densenet_bc() -> Network:
    """The same with bottlenecks of 64 channels, as the DenseNets of torchvision have them."""
    return densenet(bottleneck=64)


NETWORKS = {
    "resnet20-fashion": resnet20,
    "mobilenetv2-fashion": mobilenetv2,
    "vgg-fashion": vgg,
    "densenet-fashion": densenet,
    "densenet-bc-fashion": densenet_bc,
}


# --- training ---------------------------------------------------------------------------------


def augment(x: Tensor, pad: int = 2) -> Tensor:
    """Shift each image by up to `pad` pixels and mirror half of them."""
    n, _, height, width = x.shape
    shift = torch.randint(0, 2 * pad + 1, (2, n, 1))
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    padded = functional.pad(x, [pad] * 4, value=-MEAN / STD)[:, 0]
    image = torch.arange(n)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]][:, None]


def train(model: Network, images: Images, labels: Labels, epochs: int) -> None:
    """SGD with Nesterov momentum, one-cycle schedule, bfloat16 where the CPU has it. Ends in eval mode."""
    bfloat16 = torch.cpu._is_avx512_bf16_supported()  # emulated, it is slower than float32
    x, y = torch.from_numpy(normalize(images)), torch.from_numpy(labels.astype(np.int64))
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(
        model.parameters(),
        lr=MAX_LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, MAX_LR, total_steps=epochs * steps)
    for epoch in range(epochs):
        start, total = time.monotonic(), 0.0
        for batch in torch.randperm(len(x))[: steps * BATCH].view(steps, BATCH):
            inputs = augment(x[batch]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = functional.cross_entropy(model(inputs).float(), y[batch])
            sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            sgd.step()
            schedule.step()
            total += loss.item()
        seconds = time.monotonic() - start
        click.echo(f"  epoch {epoch + 1}/{epochs} loss {total / steps:.4f} {seconds:.0f} s")
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


# --- export and measurement -------------------------------------------------------------------


def logits_of(file: Path, images: Images) -> npt.NDArray[np.float32]:
    """Run a network in onnxruntime: N x 10 logits."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    batches = [normalize(images[i : i + 500]) for i in range(0, len(images), 500)]
    return np.concatenate([session.run(["logits"], {"input": batch})[0] for batch in batches])


def accuracy(file: Path, images: Images, labels: Labels) -> float:
    """Share of right answers, in onnxruntime, in percent."""
    return float(100 * np.mean(logits_of(file, images).argmax(1) == labels))


def unshare(model: onnx.ModelProto) -> None:
    """Give each node its own weights.

    The exporter writes equal tensors once, with an `Identity` node for every further use: the two
    BN biases before the sum of a projection block get the same gradients, so they are equal.
    """
    graph = model.graph
    weights = {w.name: w for w in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Identity"]:
        copy = graph.initializer.add()
        copy.CopyFrom(weights[node.input[0]])
        copy.name = node.output[0]
        graph.node.remove(node)


def export(model: Network, file: Path, images: Images) -> None:
    """Write `model` with its batch normalization unfolded, and compare it with torch."""
    x = torch.from_numpy(normalize(images))
    torch.onnx.export(
        model,
        (x[:2],),
        file,
        dynamo=False,
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold each BN into its convolution
        do_constant_folding=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )
    exported = onnx.load(file)
    unshare(exported)
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, file)
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(logits_of(file, images), expected, rtol=0, atol=1e-4)


def annotate(file: Path, percent: float, epochs: int, seed: int) -> None:
    """Record in the file where it comes from."""
    model = onnx.load(file)
    properties = {
        "training_data": "Fashion-MNIST, 60,000 training images (MIT, (c) 2017 Zalando SE)",
        "training": f"make_models.py --epochs {epochs} --seed {seed}",
        "accuracy": f"{percent:.2f} % of the 10,000 Fashion-MNIST test images",
        "preprocessing": PREPROCESSING,
        "licence": "Apache-2.0",
    }
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, file)


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of the convolutions and the classifier, for one image."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {w.name: list(w.dims) for w in graph.initializer}
    values = [*graph.value_info, *graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    return sum(
        math.prod(weights[node.input[1]][1:]) * math.prod(shapes[node.output[0]][1:])
        for node in graph.node
        if node.op_type in ("Conv", "Gemm")
    )


def count_parameters(model: onnx.ModelProto) -> int:
    """Trained values: running means and variances are left out."""
    bn = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    running = {name for node in bn for name in node.input[3:5]}
    weights = [w for w in model.graph.initializer if w.name not in running]
    return sum(math.prod(w.dims) for w in weights)


def print_table(data: Path, out: Path) -> None:
    """One line of markdown a file in `out`: size, cost and accuracy."""
    test, subset = load_split(data, "t10k"), np.load(out / "fashion-test2k.npz")
    click.echo("| file | shortcuts | BN | parameters | MACs | size | test 10k | test2k |")
    click.echo("|---|---:|---:|---:|---:|---:|---:|---:|")
    for file in [out / f"{name}.onnx" for name in NETWORKS if (out / f"{name}.onnx").exists()]:
        model = onnx.load(file)
        ops = [node.op_type for node in model.graph.node]
        click.echo(
            f"| `{file.name}` | {ops.count('Add')} | {ops.count('BatchNormalization')} "
            f"| {count_parameters(model):,} | {count_macs(model) / 1e6:.1f} M "
            f"| {file.stat().st_size / 1e6:.2f} MB | {accuracy(file, *test):.2f} % "
            f"| {accuracy(file, subset['x'], subset['y']):.2f} % |"
        )


# --- command line -----------------------------------------------------------------------------


@click.command()
@click.option(
    "--data",
    default=Path("/usr/share/datasets/fashion-mnist"),
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the idx files (default: that of Debian's dataset-fashion-mnist).",
)
@click.option("--out", default=Path(__file__).parent, type=click.Path(path_type=Path))
@click.option("--epochs", default=12, show_default=True, type=click.IntRange(min=1))
@click.option("--only", type=click.Choice(list(NETWORKS)), help="Make this network alone.")
@click.option("--seed", default=0, show_default=True)
@click.option("--subsets", is_flag=True, help="Write the two image samples, train nothing.")
@click.option("--evaluate", is_flag=True, help="Print the table of the files, train nothing.")
def main(
    data: Path, out: Path, epochs: int, only: str | None, seed: int, subsets: bool, evaluate: bool
) -> None:
    """Train the demo networks on Fashion-MNIST and export them to ONNX."""
    out.mkdir(parents=True, exist_ok=True)
    if subsets:
        write_subsets(data, out, seed)
    if evaluate:
        print_table(data, out)
    if subsets or evaluate:
        return
    images, labels = load_split(data, "train")
    test, truth = load_split(data, "t10k")
    for name in [only] if only else list(NETWORKS):
        click.echo(name)
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        train(model, images, labels, epochs)
        file = out / f"{name}.onnx"
        export(model, file, test[:100])
        percent = accuracy(file, test, truth)
        annotate(file, percent, epochs, seed)
        click.echo(f"  {percent:.2f} % of {len(test):,} test images")


if __name__ == "__main__":
    main()
