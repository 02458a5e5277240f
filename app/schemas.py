"""What comes in and what goes out, as marshmallow schemas."""

from typing import Any

from marshmallow import Schema, ValidationError, fields, post_dump, pre_load, validate

from app.responses import rfc3339

MOST_IDS = 1000
SESSION_ID = r"[A-Za-z0-9_-]{22,64}"
CHARACTERS = validate.Regexp(r"[^\ud800-\udfff]*\Z", error="Not valid text.")


def text(most: int, **kwargs: Any) -> fields.String:
    """Text of 1 to `most` characters. Lone surrogates are none (RFC 8259 §8.2), and Redis could not store them."""
    return fields.String(validate=[validate.Length(1, most), CHARACTERS], **kwargs)


class SessionSchema(Schema):
    """A session as callers see it; what is not known is left out. What is always there is required in the document."""

    id = fields.String(required=True)
    device_name = fields.String(data_key="deviceName")
    ip_address = fields.String(data_key="ipAddress")
    location = fields.String()
    started_at = fields.Function(lambda each: rfc3339(each.started_at_ms), data_key="startedAt", required=True)
    last_activity = fields.Function(lambda each: rfc3339(each.last_activity_ms), data_key="lastActivity", required=True)
    expires_at = fields.Function(lambda each: rfc3339(each.expires_at_ms), data_key="expiresAt", required=True)
    login_method = fields.String(data_key="loginMethod", required=True)

    @post_dump
    def leave_out_unknown(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in data.items() if value is not None}


class OpenSchema(Schema):
    """What may be said of a session when it is opened; `idle_max` is the longest idle timeout, in seconds."""

    device_name = text(128, data_key="deviceName")
    location = text(128)
    login_method = text(64, data_key="loginMethod", load_default="token")
    idle_timeout = fields.Integer(data_key="idleTimeoutSeconds", strict=True)

    def __init__(self, idle_max: int) -> None:
        super().__init__()
        # A new list, since the old one is shared by all instances.
        self.fields["idle_timeout"].validators = [validate.Range(1, idle_max)]

    @pre_load
    def leave_out_null(self, data: Any, **kwargs: Any) -> Any:
        """Some serializers write null for what is absent. Under an unknown name it is refused like any value."""
        if isinstance(data, dict):
            known = {field.data_key or name for name, field in self.fields.items()}
            return {name: value for name, value in data.items() if value is not None or name not in known}
        return {} if data is None else data


def list_of_strings(value: Any) -> None:
    """Refuse what is no list of 1 to MOST_IDS strings. It is one message, not one for each element."""
    if not (isinstance(value, list) and 1 <= len(value) <= MOST_IDS and all(isinstance(id, str) for id in value)):
        raise ValidationError(f"Not a list of 1 to {MOST_IDS} strings.")


class HeartbeatManySchema(Schema):
    """Which sessions to keep alive. A malformed id is no error: it is answered like a missing session."""

    ids = fields.Raw(required=True, validate=list_of_strings)


class Switch(fields.Boolean):
    """JSON's true or false, and nothing that only reads like one."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class RevokeAllSchema(Schema):
    """Which session to spare, if any, and whether tokens from before are to open no new one."""

    except_id = fields.String(data_key="exceptSessionId", validate=validate.Regexp(SESSION_ID + r"\Z"))
    refuse_earlier_tokens = Switch(data_key="refuseEarlierTokens")
