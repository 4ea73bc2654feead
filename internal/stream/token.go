package stream

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	tokenTTL  = time.Minute
	maxTokens = 1000
)

// tokens are the requests with unused URLs. The zero value is ready to use.
type tokens struct {
	mu     sync.Mutex
	unused map[string]ticket
}

// ticket is a request and the expiry time of its token.
type ticket struct {
	request any
	expires time.Time
}

// add returns a new secret token for a request.
func (t *tokens) add(request any, now time.Time) (token string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()

	if t.unused == nil {
		t.unused = map[string]ticket{}
	}

	for name, k := range t.unused {
		if now.After(k.expires) {
			delete(t.unused, name)
		}
	}

	if len(t.unused) >= maxTokens {
		return "", fmt.Errorf("limit of %d unused streaming URLs reached; try again in %v: %w", maxTokens, tokenTTL,
			errdefs.ErrResourceExhausted)
	}

	token = rand.Text() // at least 128 bits
	t.unused[token] = ticket{request, now.Add(tokenTTL)}

	return token, nil
}

// take returns the request of a token and invalidates the token.
func (t *tokens) take(token string, now time.Time) (request any, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k, ok := t.unused[token]
	delete(t.unused, token)
	return k.request, ok && !now.After(k.expires)
}
