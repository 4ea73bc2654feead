package engine

import (
	"crypto/rand"
	"strings"
)

// The engine takes a sequence of keys on a terminal for the wish to detach, ctrl-p ctrl-q by
// default, and keeps the beginning of one back until the next key comes. That cannot be switched
// off, so the sequences here are ones that nobody types, and begin with a key that hardly anybody
// needs.

// detachKeys is how long the sequences are.
const detachKeys = 32

// execDetachKeys returns the sequence of an exec. The engine accepts characters of ASCII alone, so
// it begins with NUL, and goes on at random.
func execDetachKeys() string {
	return strings.Join(append([]string{"ctrl-@"}, strings.Split(rand.Text()+rand.Text(), "")[:detachKeys]...), ",")
}

// attachDetachKeys returns the sequence of an attach, which goes to the engine byte by byte. It
// begins with a byte that no text has, in UTF-8 or ASCII.
func attachDetachKeys() string {
	return strings.Join(append([]string{"\xff"}, strings.Split(rand.Text()+rand.Text(), "")[:detachKeys]...), ",")
}
