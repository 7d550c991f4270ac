"""The table of packages, `packages.toml`: what is pinned, from which registry, and under which licence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.core.config import build, read_toml

TABLE = Path(__file__).with_name("packages.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A pinned package."""

    registry: Literal["npm", "debian"]
    """Registry, which also selects the client: npm, or Debian's apt-get and dpkg-deb."""
    name: str
    """Name in the registry."""
    version: str
    """Version, exact."""
    integrity: str
    """SHA-512 of the file, in npm's form: `sha512-` and the digest in base64."""
    content: str | None = None
    """SHA-512 of what is in it, documentation aside (`archives.content_of`), in the same form. If given,
    another revision with the same content takes the place of one that its registry no longer has.
    """
    licence: str
    """SPDX expression of what is used here."""
    licence_file: str
    """Path of the licence text inside the package."""
    credit: str
    """Whose work it is, and where."""

    @property
    def pinned(self) -> str:
        """Name and version as the registry's client takes them."""
        return f"{self.name}{'@' if self.registry == 'npm' else '='}{self.version}"

    @property
    def source(self) -> str:
        """Registry, name and version, as they stand next to each image."""
        return f"{self.registry} {self.name} {self.version}"


def read_packages(path: Path = TABLE) -> dict[str, Package]:
    """Read a table of packages by role.

    Raises:
        ConfigError: for a missing, unknown or malformed key; it names the file and the key.
    """
    return {role: build(Package, fields, f"{path}: {role}") for role, fields in read_toml(str(path)).items()}
