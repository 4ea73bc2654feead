package bundle

import (
	"crypto/rand"
	"encoding/json"
	"slices"
	"testing"

	"cri-dockerd/internal/shim/annotation"
)

// TestTakeOutput verifies that only a valid token leaves the environment. Everything else belongs
// to the image or the user.
func TestTakeOutput(t *testing.T) {
	token := rand.Text()
	set := annotation.OutputVariable + "="
	for name, c := range map[string]struct {
		env, want []string
		token     string
	}{
		"none":           {[]string{"A=1"}, []string{"A=1"}, ""},
		"token":          {[]string{"A=1", set + token, "B=2"}, []string{"A=1", "B=2"}, token},
		"of the image":   {[]string{set + "/etc"}, []string{set + "/etc"}, ""},
		"in a value":     {[]string{"A=" + set + token}, []string{"A=" + set + token}, ""},
		"other variable": {[]string{"X" + set + token}, []string{"X" + set + token}, ""},
		"both":           {[]string{set + "../x", set + token}, []string{set + "../x"}, token},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := json.Marshal(m{"env": c.env, "cwd": "/", "new": 1})
			if err != nil {
				t.Fatal(err)
			}

			out, got, err := TakeOutput(in)
			if err != nil || got != c.token {
				t.Fatalf("token %q, %v, want %q", got, err, c.token)
			}

			var process struct {
				Env []string
				Cwd string
				New int
			}
			if err := json.Unmarshal(out, &process); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(process.Env, c.want) || process.Cwd != "/" || process.New != 1 {
				t.Errorf("%s", out)
			}
		})
	}

	if _, _, err := TakeOutput([]byte(`{"env":"` + set + `"}`)); err == nil {
		t.Error("an environment of another type is accepted")
	}
}
