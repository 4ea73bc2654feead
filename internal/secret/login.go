package secret

import (
	"encoding/base64"
	"strings"
)

// Login is a registry login (CRI AuthConfig, Docker's X-Registry-Auth). Empty fields are unset.
type Login struct {
	Username      string
	Password      string
	Auth          string // base64 of "user:password"
	IdentityToken string
	RegistryToken string
}

// Secrets returns the known secrets of a login for Mask and Hide, including the forms in which
// clients send them.
func (l Login) Secrets() []string {
	known := []string{l.Password, l.Auth, l.IdentityToken, l.RegistryToken}
	if l.Password != "" {
		known = append(known, base64.StdEncoding.EncodeToString([]byte(l.Username+":"+l.Password)))
	}

	if plain, err := base64.StdEncoding.DecodeString(l.Auth); err == nil {
		if _, password, ok := strings.Cut(strings.TrimRight(string(plain), "\x00"), ":"); ok {
			known = append(known, password)
		}
	}

	return known
}
