"""API keys → tenants.

Owns how keys are generated, hashed and looked up, and the validation and reloading of tenant lists. Independent of
transports and quotas. Keys are never stored, only their SHA-256, which is sufficient for keys of 256 random bits.

**Reloading.** A new list replaces the old one as a whole or, if invalid, not at all. A request that is being admitted
at that moment continues with the old list. Running requests use neither: their tickets contain everything needed for
settlement, so requests of a removed tenant end, and are billed, like any other.
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
from musicgen_serving.errors import UnauthenticatedError
from musicgen_serving.settings import AccessSettings, TenantSettings
from musicgen_serving.watched_files import WatchedFiles

KEY_PREFIX = "mg-"
KEY_BYTES = 32
MAX_SHOWN = 30
"""Longest field name that a message may repeat: keys and their hashes are longer."""

log = logging.getLogger(__name__)


def new_key() -> str:
    """A new API key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_key(key: str) -> str:
    """SHA-256 of an API key in lower-case hex, as stored in the settings."""
    return hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()


class Tenancy:
    """The tenants of the service.

    Args:
        content: of the tenants file, if it has already been read.

    Raises:
        InvalidRequestError: the list of tenants is invalid: unreadable, an unknown field, a duplicate name or key.
    """

    def __init__(self, access: AccessSettings, content: bytes | None = None) -> None:
        listed: list[TenantSettings] = [
            *access.tenants,
            *(_from_file(access.tenants_file, content) if access.tenants_file else ()),
        ]
        if access.open:
            if access.anonymous.key_sha256:
                raise InvalidRequestError("no keys for the anonymous tenant", "some", param="access.anonymous")
            listed.append(access.anonymous)
        elif not any(tenant.key_sha256 for tenant in listed):
            raise InvalidRequestError("a tenant with a key, or open: true", "none", param="access")
        self._settings: dict[str, TenantSettings] = {tenant.name: tenant for tenant in listed}
        if len(self._settings) < len(listed):
            names = [tenant.name for tenant in listed]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InvalidRequestError("unique tenant names", f"{twice} more than once", param="access.tenants")
        self._keys = [(key, _tenant(settings)) for settings in listed for key in settings.key_sha256]
        if len({key for key, _ in self._keys}) < len(self._keys):
            raise InvalidRequestError("unique keys", "a key that is listed twice", param="access.tenants")
        self._anonymous = _tenant(access.anonymous) if access.open else None

    def authenticate(self, api_key: str | None) -> Tenant:
        """The tenant of an API key; None or empty: no key.

        Raises:
            UnauthenticatedError: missing or invalid key.
        """
        return self.find(hash_key(api_key) if api_key else None)

    def find(self, key_sha256: str | None) -> Tenant:
        """The tenant of a hashed API key (see `hash_key`); None: no key.

        Always compares all hashes, so that timing reveals nothing about them.

        Raises:
            UnauthenticatedError: missing or invalid key.
        """
        if key_sha256 is None or (self._anonymous is not None and not self._keys):
            if self._anonymous is None:
                raise UnauthenticatedError("missing API key; send it as `Authorization: Bearer KEY`")
            return self._anonymous
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, key_sha256):
                found = tenant
        if found is None:
            raise UnauthenticatedError("invalid API key")
        return found

    def settings_of(self, name: str) -> TenantSettings:
        """Settings of a tenant.

        Raises:
            UnauthenticatedError: no such tenant, or it has been removed.
        """
        settings = self._settings.get(name)
        if settings is None:
            raise UnauthenticatedError("unknown tenant")
        return settings

    def compared_to(self, former: Tenancy) -> str:
        """Summary of the changes, for the log; no tenant names."""
        changed = sum(former._settings.get(name) != settings for name, settings in self._settings.items())
        gone = len(former._settings.keys() - self._settings.keys())
        return f"{len(self._settings)} tenants, {changed} of them new or changed; {gone} removed"


class LiveTenancy:
    """The current list of tenants; `look` reloads it.

    Raises:
        InvalidRequestError: the initial list is invalid.
    """

    def __init__(self, access: AccessSettings) -> None:
        self._access = access
        # Before reading the list: a change in between merely causes a second read.
        self._file = WatchedFiles(*([access.tenants_file] if access.tenants_file else ()))
        self.now = Tenancy(access)
        self.is_stale = False
        """Whether the file is invalid, so that the previous list is still in use."""

    def look(self) -> None:
        """Reload the file if it has changed and is valid. Thread-safe with respect to readers of `now`."""
        if not self._file.have_changed():
            return
        try:
            newest = Tenancy(self._access, *self._file.contents)
        except (OSError, InvalidRequestError) as error:
            self.is_stale = True
            log.error("invalid tenants file, keeping the previous list: %s", error)
            return
        log.info("tenants file reloaded: %s", newest.compared_to(self.now))
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
    """Tenants of a YAML list; None: read it from `path`."""
    param = "access.tenants_file"
    try:
        text = (path.read_bytes() if content is None else content).decode("utf-8")
        values = yaml.safe_load(text)
    except Exception as error:  # PyYAML raises arbitrary exceptions, such as KeyError for `!!bool perhaps`
        # From None: YAML's message quotes the lines around the problem.
        raise InvalidRequestError("a readable YAML file", f"{path} ({type(error).__name__})", param=param) from None
    if not isinstance(values, list):
        raise InvalidRequestError("a list of tenants", f"{type(values).__name__} in {path}", param=param)
    try:
        return TypeAdapter(list[TenantSettings]).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(_shown, e['loc']))}: {e['msg']}" for e in error.errors())
        # From None: the cause would print the values, and an operator may have pasted a key instead of its hash.
        raise InvalidRequestError("valid tenants", f"{problems} in {path}", param=param) from None


def _shown(part: int | str) -> str:
    """A location in the list, for messages. Long ones are hidden: a key may have been pasted as a field name."""
    return str(part) if len(str(part)) <= MAX_SHOWN else "..."
