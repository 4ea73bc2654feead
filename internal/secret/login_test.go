package secret

import (
	"slices"
	"testing"
)

func TestLoginSecrets(t *testing.T) {
	for name, test := range map[string]struct {
		login Login
		want  []string
	}{
		"password": {Login{Username: "user", Password: "p4ssword"}, []string{"p4ssword", "dXNlcjpwNHNzd29yZA=="}},
		"auth":     {Login{Auth: "dXNlcjpwNHNzd29yZA=="}, []string{"dXNlcjpwNHNzd29yZA==", "p4ssword"}},
		"tokens":   {Login{IdentityToken: "identity", RegistryToken: "registry"}, []string{"identity", "registry"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := test.login.Secrets()

			for _, want := range test.want {
				if !slices.Contains(got, want) {
					t.Errorf("secrets %q, want %q among them", got, want)
				}
			}
		})
	}
}
