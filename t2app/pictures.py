"""Pictures as files: reading one, and saying what is wrong with one that cannot be read. Nothing here imports torch."""

from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

# More than any camera's; a model sees a picture far smaller than this.
_MOST_PIXELS = 120_000_000


class PictureError(ValueError):
    """A file cannot be used as a picture; the message is for the person who gave it."""


def read_picture(source: Path | bytes) -> Image.Image:
    """The picture in a file or in the bytes of one: upright, in RGB, on white where it is transparent.

    Raises:
        PictureError: there is no such file, it holds no picture or a damaged one, or one that is too large.
    """
    name = "the file" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height <= _MOST_PIXELS:
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
                return upright.convert("RGB")
    except FileNotFoundError:
        raise PictureError(f"there is no picture file {name}") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is no picture that can be read; a PNG, JPEG or WebP is one") from None
    except Exception as error:  # noqa: BLE001  a damaged file makes the decoders raise whatever they run into
        raise PictureError(f"{name} is a damaged picture, or none ({error}); open it and save it anew") from None
    raise PictureError(f"{name} has {width:,} × {height:,} pixels; at most {_MOST_PIXELS:,} are read. Make it smaller")
