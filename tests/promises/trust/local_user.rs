//! Another user of the gateway's machine tries to read, change or block what the door keeps there.
