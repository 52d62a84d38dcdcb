"""What everything else stands on: state, views of parameters, shards, numbers; nothing here knows a policy."""
