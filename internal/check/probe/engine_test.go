package probe

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
)

// docker answers as an engine of an API version does, as far as it is asked.
func docker(api, version string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Api-Version", api)
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/info") {
			fmt.Fprintf(w, `{"ServerVersion":%q,"OSType":"linux","Driver":"overlay2","CgroupDriver":"systemd",`+
				`"LoggingDriver":"local","LiveRestoreEnabled":true,"DockerRootDir":"/d"}`, version)
		}
	}
}

// TestEngine tells apart why an engine does not answer, by its kind and not by its words.
func TestEngine(t *testing.T) {
	serve := func(start func(http.Handler) *httptest.Server, h http.Handler) string {
		s := start(h)
		t.Cleanup(s.Close)
		return "tcp://" + s.Listener.Addr().String()
	}

	silent, err := net.Listen("unix", filepath.Join(t.TempDir(), "silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()

	nowhere := filepath.Join(t.TempDir(), "nowhere")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	free.Close()
	for name, c := range map[string]struct {
		endpoint, env string
		want          finding.Problem
	}{
		"healthy":           {serve(httptest.NewServer, docker("1.45", "26.1.0")), "", ""},
		"too old":           {serve(httptest.NewServer, docker("1.40", "19.03.15")), "", finding.TooOld},
		"plain text to TLS": {serve(httptest.NewTLSServer, docker("1.45", "26.1.0")), "", finding.TLS},
		"no socket":         {"unix://" + nowhere, "", finding.Missing},
		"no socket by env":  {"", "unix://" + nowhere, finding.Missing},
		"nobody listens":    {"tcp://" + free.Addr().String(), "", finding.Refused},
		"silent":            {"unix://" + silent.Addr().String(), "", finding.Silent},
		"no endpoint":       {"gopher", "", finding.Other},
	} {
		t.Setenv("DOCKER_HOST", c.env)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		e := tree(t, nil).engine(ctx, &config.Config{DockerEndpoint: c.endpoint})
		cancel()
		if e.Problem != c.want || (e.Error == "") != (c.want == "") {
			t.Errorf("%s: %q %s", name, e.Problem, e.Error)
		}

		if name == "healthy" && (e.Version != "26.1.0" || e.API != "1.45" || e.LogDriver != "local" || !e.LiveRestore ||
			e.RootDir != "/d" || e.CgroupDriver != "systemd") {
			t.Errorf("%+v", e)
		}
	}
}
