"""The network: a torchvision backbone, a small head for its features and for metadata, and the way back to grams."""

import contextlib
import copy
import urllib.error
import warnings
import zipfile
from pathlib import Path

import torch
import torch.fx
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from devices import ALONE
from inputs import UserError, one_line
from metadata import MetadataEncoder
from outputs import whole_file

# The rest of torchvision's classifiers fits one way of taking the classifier off: these have no linear layer at their
# end, or several outputs while they train.
UNFIT = ("squeezenet1_0", "squeezenet1_1", "googlenet", "inception_v3")
BACKBONES = [name for name in torchvision.models.list_models(torchvision.models) if name not in UNFIT]
LARGEST = 2048  # pixels a side
TRANSFORMS = ("none", "log", "sqrt", "standardize")


# ---------------------------------------------------------------- target


class TargetTransform(nn.Module):
    """Targets in the unit that the loss sees, and the way back.

    none: as they are. standardize: mean 0 and standard deviation 1 over the training rows. log, sqrt: of the logarithm
    or the square root, then standardized. The inverse of a mean of logarithms or roots is below the mean: `balance`
    makes up for it by the ratio of the sums of measured and predicted training targets (Snowdon 1991, Canadian Journal
    of Forest Research 21, 720-724).
    """

    def __init__(self, kind="none"):
        super().__init__()
        self.kind = kind
        for name, value in (("mean", 0.0), ("scale", 1.0), ("ratio", 1.0)):
            self.register_buffer(name, torch.tensor(value))

    @property
    def curved(self):
        return self.kind in ("log", "sqrt")

    def fit(self, targets):
        """Take mean and standard deviation from the training targets (n,)."""
        if self.curved and not (targets > 0).all():
            raise UserError(f"--target_transform {self.kind} needs targets above 0, the lowest is {targets.min():g}")
        curved = self.bend(torch.as_tensor(targets, dtype=torch.float64))
        if self.kind != "none":
            self.mean.fill_(curved.mean())
            self.scale.fill_(curved.std(correction=0) if curved.std(correction=0) > 0 else 1.0)

    def bend(self, targets):
        return targets.log() if self.kind == "log" else targets.sqrt() if self.kind == "sqrt" else targets

    def apply_to(self, targets):
        return (self.bend(targets) - self.mean) / self.scale

    def undo(self, outputs):
        curved = outputs * self.scale + self.mean
        if self.kind == "log":
            return curved.exp() * self.ratio
        return curved.clamp(min=0).square() * self.ratio if self.kind == "sqrt" else curved

    def balance(self, predicted, measured):
        """Set the ratio from training targets and their predictions in the same unit, made with the present ratio."""
        if predicted.sum() > 0:
            self.ratio.mul_(float(measured.sum() / predicted.sum()))


# ---------------------------------------------------------------- head


class Standardize(nn.Module):
    """Features with mean 0 and standard deviation 1 over the training rows; one that never changes stays 0."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def fit(self, features):
        features = features.cpu().double()  # mps has no float64
        scale = features.std(0, correction=0)
        self.mean.copy_(features.mean(0))
        self.scale.copy_(torch.where(scale > 1e-6 * features.abs().amax(0), scale, torch.inf))

    def forward(self, features):
        return (features - self.mean) / self.scale


class Head(nn.Module):
    """Features (n, width) and metadata (n, metadata_width) to one number (n,) in the unit of `target`.

    Without metadata it is the study's: Dropout(0.3), Linear(256), ReLU, Linear(1). Metadata go through a smaller head
    of the same kind, and both meet in the last layer. A width of 0 leaves that side out.
    """

    def __init__(self, width, metadata_width=0, standardize=False, target_transform="none"):
        super().__init__()
        self.standardize = Standardize(width) if standardize and width else None
        self.image = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, 256), nn.ReLU()) if width else None
        self.metadata = nn.Sequential(nn.Linear(metadata_width, 32), nn.ReLU()) if metadata_width else None
        self.last = nn.Linear(256 * bool(width) + 32 * bool(metadata_width) or 1, 1)  # 1: a place holder, see new_head
        self.target = TargetTransform(target_transform)

    def forward(self, features, metadata):
        sides = []
        if self.image:
            sides.append(self.image(self.standardize(features) if self.standardize else features))
        if self.metadata:
            sides.append(self.metadata(metadata))
        return self.last(torch.cat(sides, dim=1)).squeeze(1)


# ---------------------------------------------------------------- whole


class BiomassModel(nn.Module):
    """A torchvision backbone without its classifier, and a Head; photos and metadata in, one number a photo out.

    Images are uint8 (n, 3, image_size, image_size); `model_name` None leaves backbone and images out. The backbone
    learns from its module `learn_from` on, in the order in which torchvision lists its modules: None freezes it whole,
    "" lets all of it learn. What does not learn stays in eval mode, because BatchNorm in train mode would follow the
    training photos without any gradient. Raises UserError where the backbone has no such module or takes no such size.
    """

    def __init__(self, model_name, learn_from=None, precision="fp32", image_size=None):
        super().__init__()
        self.model_name, self.learn_from, self.precision = model_name, learn_from, precision
        self.backbone, self.head, self.width, self.learning, self.after, self.image_size = None, None, 0, set(), None, 0
        if model_name:
            preset = torchvision.models.get_model_weights(model_name).DEFAULT.transforms()
            self.image_size, self.mean, self.std = (
                image_size or preset.crop_size[0],
                list(preset.mean),
                list(preset.std),
            )
            size = {"image_size": self.image_size} if model_name.startswith("vit_") else {}
            try:
                self.backbone = torchvision.models.get_model(model_name, weights=None, **size)
                self.random_state = torch.get_rng_state()
                self.width = take_classifier_off(self.backbone)
                if image_size and image_size != preset.crop_size[0]:
                    with torch.inference_mode():
                        self.backbone.eval()(torch.zeros(2, 3, image_size, image_size))
            except (RuntimeError, ValueError, AssertionError) as error:
                raise UserError(
                    f"--image_size {self.image_size} does not suit {model_name}: {one_line(error)}"
                ) from error
            self.learning = modules_from(self.backbone, learn_from, model_name)
        else:
            self.random_state = torch.get_rng_state()
        for _, module in self.frozen_modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.new_head()

    def new_head(self, **choices):
        """Put a head in place, with the same random weights each time; `choices` are those of Head."""
        device = self.head.last.weight.device if self.head else torch.device("cpu")
        state = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        self.choices, self.head = choices, Head(self.width, **choices).to(device)
        torch.set_rng_state(state)
        self.train()

    @property
    def target(self):
        return self.head.target

    def frozen_modules(self):
        modules = self.backbone.named_modules(prefix="backbone") if self.backbone else ()
        return [(name, module) for name, module in modules if name not in self.learning]

    def learned_state(self):
        """Copy of all in the state dict that training can change."""
        frozen = {name for name, _ in self.frozen_modules()}
        state = self.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if name.rpartition(".")[0] not in frozen}

    def train(self, mode=True):
        super().train(mode)
        for _, module in self.frozen_modules():
            module.training = False
        return self

    def features(self, inputs):
        """float32 (n, width) of uint8 images, or of what the extractor of `split` said of them."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            if inputs.dtype == torch.uint8:
                inputs = self.backbone(self.normalize(inputs))
            elif self.after:
                layout = torch.channels_last if inputs.dim() == 4 else torch.contiguous_format
                inputs = self.after[self.training](inputs.float().contiguous(memory_format=layout))
        return inputs.float()

    def forward(self, inputs, metadata):
        return self.head(self.features(inputs), metadata)

    def normalize(self, images):
        """uint8 images (n, 3, ...) as the backbone's ImageNet weights expect them, in one step over the batch."""
        mean, std = (torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (self.mean, self.std))
        return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))

    def split(self):
        """The part of the backbone before all that learns; None where more than one tensor leaves it.

        Afterwards `features` takes what this part says in place of images.
        """
        if not self.learning:
            return self.backbone
        training = self.training
        parts = [cut(self.train(mode).backbone, self.learning) for mode in (False, True)]  # torch.fx fixes the mode
        self.train(training)
        if None in parts:
            return None
        self.after = [after for _, after in parts]
        return parts[0][0]

    def extractor(self, part):
        """A frozen `part` of the backbone as fast as it goes: images uint8 -> what it says of them, float32.

        BatchNorm is folded into the convolutions before it. torch.compile gains a tenth more, and its start-up eats
        that at fewer than some 25,000 photos.
        """
        from torch.fx.experimental.optimization import fuse

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        part = copy.deepcopy(part).eval()
        with contextlib.suppress(Exception):  # a backbone that torch.fx cannot trace stays as it is, a little slower
            part = fuse(part)
        part = part.to(dtype=dtype, memory_format=torch.channels_last)
        return lambda images: part(self.normalize(images).to(dtype)).float()

    def settings(self):
        """What from_checkpoint needs to build the same model again, in plain values."""
        return {
            "model_name": self.model_name,
            "learn_from": self.learn_from,
            "precision": self.precision,
            "image_size": self.image_size or None,
            "head": self.choices,
        }


def take_classifier_off(backbone):
    """Replace the last linear layer, the one with ImageNet's 1000 classes, by nothing; returns the width before it."""
    name, layer = [(name, layer) for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)][-1]
    parent, _, last = name.rpartition(".")
    setattr(backbone.get_submodule(parent), last, nn.Identity())
    return layer.in_features


def modules_from(backbone, name, model_name):
    """Names, as in a BiomassModel, of the modules from `name` on; none for None."""
    if name is None:
        return set()
    names = [name for name, _ in backbone.named_modules()]
    if name not in names or not any(
        True for later in names[names.index(name) :] for _ in backbone.get_submodule(later).parameters()
    ):
        few = [name for name, _ in backbone.named_children()]
        few = few if len(few) > 4 else [name for name in names if 0 < len(name) and name.count(".") < 2]
        raise UserError(f"--unfreeze_from {name}: {model_name} has nothing to train there; it has {', '.join(few)}")
    return {f"backbone.{name}".rstrip(".") for name in names[names.index(name) :]}


class Tracer(torch.fx.Tracer):
    """torch.fx's, which leaves dropped paths the modules that they are, as several processes exchange them."""

    def is_leaf_module(self, module, name):
        return isinstance(module, StochasticDepth) or super().is_leaf_module(module, name)


def cut(backbone, learning):
    """`backbone` as two graphs, before and after the first of the modules that learn; None where it cannot be cut.

    The second holds all that depends on a module that learns. It can be cut if one tensor alone leads there.
    """
    try:
        nodes = list(Tracer().trace(backbone).nodes)
    except Exception:  # torch.fx raises whatever a model's own code stumbles over
        return None
    after = set()
    for node in nodes:
        owner = node.target if node.op == "call_module" else str(node.target).rpartition(".")[0]
        learns = node.op in ("call_module", "get_attr") and f"backbone.{owner}".rstrip(".") in learning
        if learns or after.intersection(node.all_input_nodes):
            after.add(node)
    crossing = {node for last in after for node in last.all_input_nodes if node not in after and node.op != "get_attr"}
    if len(crossing) != 1 or next(iter(crossing)).op == "placeholder":
        return None
    (crossing,) = crossing
    graphs = torch.fx.Graph(), torch.fx.Graph()
    copies = {}
    for node in nodes:
        if node not in after:
            copies[node] = graphs[0].node_copy(node, copies.get)
    graphs[0].output(copies[crossing])
    copies = {crossing: graphs[1].placeholder("stored")}
    for node in nodes:
        if node in after or node.op == "get_attr":
            copies[node] = graphs[1].node_copy(node, copies.get)
    return tuple(torch.fx.GraphModule(backbone, graph) for graph in graphs)


def build_model(model_name, weights, learn_from, precision, device, image_size=None, group=ALONE):
    """A BiomassModel with the backbone weights that `--weights` names; the rest is drawn from torch's seed."""
    model = BiomassModel(model_name, learn_from, precision, image_size)
    state = group.first(load_weights, model_name, weights) if model_name else None
    if state is not None:
        wanted = model.backbone.state_dict()
        fits = [name for name in wanted if name in state and state[name].shape == wanted[name].shape]
        if len(fits) < len(wanted):
            missing = next(name for name in wanted if name not in fits)
            raise UserError(
                f"--weights {weights} is not of a {model_name}: {len(wanted) - len(fits)} tensors are missing or of "
                f"another shape, '{missing}' first; pass the --model_name and the --image_size that fit"
            )
        model.backbone.load_state_dict({name: state[name] for name in wanted})
    return model.to(device, memory_format=torch.channels_last)


def from_checkpoint(checkpoint, device):
    """The BiomassModel that was saved, in eval mode."""
    settings = dict(checkpoint["settings"])
    choices = settings.pop("head")
    known = settings["model_name"] in (None, *BACKBONES) and 0 <= (settings["image_size"] or 0) <= LARGEST
    if not known or choices.get("metadata_width", 0) != MetadataEncoder(checkpoint["metadata"]).width:
        raise ValueError("no checkpoint of ours")  # told before it takes memory
    model = BiomassModel(**settings)
    model.new_head(**choices)
    model.load_state_dict(checkpoint["model_state"])
    return model.to(device, memory_format=torch.channels_last).eval()


def load_weights(model_name, weights):
    """State dict for `--weights`: None for "none", torchvision's ImageNet weights, or those in a file."""
    if weights == "none":
        return None
    if weights == "imagenet":
        source = torchvision.models.get_model_weights(model_name).DEFAULT
        path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
        try:
            return source.get_state_dict(progress=False, weights_only=True)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"cannot download the ImageNet weights ({error}): fetch {source.url} elsewhere and put it at {path}, "
                "or train without them by --weights none"
            ) from error
        except Exception as error:  # whatever a damaged file makes the unpickler stumble over
            raise UserError(f"{path} is not a weight file, remove it ({type(error).__name__})") from error
    if not Path(weights).is_file():
        raise UserError(f"no weight file at {weights}: --weights takes imagenet, none or a file")
    try:
        state = load_plain(weights)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except Exception as error:
        raise UserError(
            f"--weights {weights} is not a file of plain PyTorch weights ({type(error).__name__})"
        ) from error


def load_plain(path):
    """Tensors and plain values of a file of torch.save; raises where it holds code, or packed more than its size."""
    if zipfile.is_zipfile(path):  # torch.save packs nothing
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
        if packed or sum(part.file_size for part in parts) > Path(path).stat().st_size:
            raise ValueError(f"{path} is a packed archive")
    with warnings.catch_warnings():  # torch says of some foreign files how their pickle was written
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def save_plain(content, path, told=True):
    """Write tensors and plain values for load_plain."""
    with whole_file(path, told) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ or error from None  # the full disk that torch has hidden
