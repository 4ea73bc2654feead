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

// docker returns a minimal Docker API of a version.
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

// TestEngine checks the kind of each connection problem.
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
		"not listening":     {"tcp://" + free.Addr().String(), "", finding.Refused},
		"silent":            {"unix://" + silent.Addr().String(), "", finding.Silent},
		"no endpoint":       {"gopher", "", finding.Other},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("DOCKER_HOST", c.env)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()

			e := tree(t, nil).engine(ctx, &config.Config{DockerEndpoint: c.endpoint})
			if e.Problem != c.want || (e.Error == "") != (c.want == "") {
				t.Errorf("got problem %q (%s), want %q", e.Problem, e.Error, c.want)
			}

			if name == "healthy" && (e.Version != "26.1.0" || e.API != "1.45" || e.LogDriver != "local" ||
				!e.LiveRestore || e.RootDir != "/d" || e.CgroupDriver != "systemd") {
				t.Errorf("got %+v", e)
			}
		})
	}
}
