package engine

import (
	"crypto/rand"
	"strings"
)

// The engine detaches from a terminal after a sequence of keys, by default ctrl-p ctrl-q. It holds
// back a partial sequence until the next key. This cannot be disabled, so the sequences here are
// random and start with a rarely used key.

// detachKeys is the length of the sequences.
const detachKeys = 32

// execDetachKeys returns the sequence for an exec. The engine accepts only ASCII characters, so the
// sequence starts with NUL.
func execDetachKeys() string {
	return strings.Join(append([]string{"ctrl-@"}, strings.Split(rand.Text()+rand.Text(), "")[:detachKeys]...), ",")
}

// attachDetachKeys returns the sequence for an attach. The engine compares bytes, so the sequence
// starts with a byte invalid in UTF-8 and ASCII text.
func attachDetachKeys() string {
	return strings.Join(append([]string{"\xff"}, strings.Split(rand.Text()+rand.Text(), "")[:detachKeys]...), ",")
}
