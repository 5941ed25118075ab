"""API keys → tenants.

Owns how keys are made, hashed and looked up, which lists of tenants are accepted, and which is in force. Knows no
transport and no allowance. A key itself is kept nowhere: only its SHA-256, which is enough for keys of 256 random bits.

**A list that changes.** A new list takes the place of the old one as a whole, or, if it cannot be used, not at all. A
request that is being admitted at that moment goes on with what the old one said. Those that run ask neither: their
tickets say all that their end needs, so requests of a tenant that is gone end, and are billed, like any other.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from musicgen.errors import InvalidRequestError
from musicgen_serving.admission import Tenant
from musicgen_serving.changing_files import ChangingFiles
from musicgen_serving.errors import UnauthenticatedError
from musicgen_serving.settings import AccessSettings, TenantSettings

KEY_PREFIX = "mg-"
KEY_BYTES = 32
MAX_SHOWN = 30
"""Longest name of a field that a message repeats: keys and their hashes are longer."""

log = logging.getLogger(__name__)


def new_key() -> str:
    """A new API key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """SHA-256 of an API key in lower-case hex: what settings hold in its place."""
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


class Tenancy:
    """Who may use the service.

    Args:
        content: of the tenants file, if it has been read.

    Raises:
        InvalidRequestError: the list of tenants cannot be used: unreadable, an unknown field, a name or key twice.
    """

    def __init__(self, access: AccessSettings, content: bytes | None = None) -> None:
        listed: list[TenantSettings] = [
            *access.tenants,
            *(_from_file(access.tenants_file, content) if access.tenants_file else ()),
        ]
        if access.open:
            if access.anonymous.key_sha256:
                raise InvalidRequestError("no keys for whoever has no key", "some", param="access.anonymous")
            listed.append(access.anonymous)
        elif not any(tenant.key_sha256 for tenant in listed):
            raise InvalidRequestError("a tenant with a key, or open: true", "none", param="access")
        self._settings: dict[str, TenantSettings] = {tenant.name: tenant for tenant in listed}
        if len(self._settings) < len(listed):
            names = [tenant.name for tenant in listed]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRequestError("different names of tenants", f"{twice} more than once", param="access.tenants")
        self._keys = [(key, _tenant(settings)) for settings in listed for key in settings.key_sha256]
        if len({key for key, _ in self._keys}) < len(self._keys):
            raise InvalidRequestError(
                "each key for one tenant only", "one that is listed twice", param="access.tenants"
            )
        self._anonymous = _tenant(access.anonymous) if access.open else None

    def authenticate(self, api_key: str | None) -> Tenant:
        """The tenant of an API key; None or an empty one is no key.

        Raises:
            UnauthenticatedError: no key where one is needed, or an unknown one.
        """
        return self.find(hash_key(api_key) if api_key else None)

    def find(self, key_sha256: str | None) -> Tenant:
        """The tenant of a hashed API key (see `hash_key`), None: no key.

        All hashes are compared, whichever fits, so that the time taken says nothing about them.

        Raises:
            UnauthenticatedError: no key where one is needed, or an unknown one.
        """
        if key_sha256 is None or (self._anonymous is not None and not self._keys):
            if self._anonymous is None:
                raise UnauthenticatedError("expected an API key, got none; send it as `Authorization: Bearer KEY`")
            return self._anonymous
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, key_sha256):
                found = tenant
        if found is None:
            raise UnauthenticatedError("expected a known API key, got another; ask the operator for one")
        return found

    def settings_of(self, name: str) -> TenantSettings:
        """Settings of a tenant.

        Raises:
            UnauthenticatedError: no such tenant (any more).
        """
        settings = self._settings.get(name)
        if settings is None:
            raise UnauthenticatedError("expected a tenant of this service, got one it does not know")
        return settings

    def compared_to(self, former: Tenancy) -> str:
        """What is new, in words for the log: no names."""
        changed = sum(former._settings.get(name) != settings for name, settings in self._settings.items())
        gone = len(former._settings.keys() - self._settings.keys())
        return f"{len(self._settings)} tenants, {changed} of them new or changed; {gone} gone"


class LiveTenancy:
    """The list in force. `look` brings in a new one; until then nothing changes.

    Raises:
        InvalidRequestError: the first list cannot be used.
    """

    def __init__(self, access: AccessSettings) -> None:
        self._access = access
        # Looked at first: what changes before the list is read, and is read twice for it, does no harm.
        self._file = ChangingFiles(*([access.tenants_file] if access.tenants_file else ()))
        self.now = Tenancy(access)
        self.is_stale = False
        """Whether the file says something that cannot be used, so that an older list is in force."""

    def look(self) -> None:
        """Take the file's list, if it is new and can be used. Safe in a thread beside those who use `now`."""
        if not self._file.have_changed():
            return
        try:
            newest = Tenancy(self._access, *self._file.contents)
        except (OSError, InvalidRequestError) as error:
            self.is_stale = True
            log.error("the list of tenants cannot be used, the old one stays in force: %s", error)
            return
        log.info("a new list of tenants is in force: %s", newest.compared_to(self.now))
        self.now, self.is_stale = newest, False


def _tenant(settings: TenantSettings) -> Tenant:
    return Tenant(
        name=settings.name,
        tenant_class=settings.tenant_class,
        weight=settings.weight,
        priority=settings.priority,
        max_duration_s=settings.max_duration_s,
        models=None if settings.models is None else frozenset(settings.models),
    )


def _from_file(path: Path, content: bytes | None) -> list[TenantSettings]:
    """Tenants of a YAML list; None: it is read."""
    param = "access.tenants_file"
    try:
        text = (path.read_bytes() if content is None else content).decode("utf-8")
        values = yaml.safe_load(text)
    except Exception as error:  # PyYAML raises errors of any kind, such as KeyError for `!!bool perhaps`
        # From None: YAML's own words show the lines around the problem.
        raise InvalidRequestError("a readable YAML file", f"{path} ({type(error).__name__})", param=param) from None
    if not isinstance(values, list):
        raise InvalidRequestError("a list of tenants", f"{type(values).__name__} in {path}", param=param)
    try:
        return TypeAdapter(list[TenantSettings]).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(_shown, e['loc']))}: {e['msg']}" for e in error.errors())
        # From None: the cause would print the values, and someone may have pasted a key where its hash belongs.
        raise InvalidRequestError("valid tenants", f"{problems} in {path}", param=param) from None


def _shown(part: int | str) -> str:
    """A place in the list, for messages; whoever forgot the name of a field may have written a key in its place."""
    return str(part) if len(str(part)) <= MAX_SHOWN else "..."
