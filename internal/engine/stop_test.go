package engine

import (
	"net/http"
	"path"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// TestStopWithoutGrace checks that Stop never sends the stop signal without a grace period, and
// succeeds for a stopped container.
func TestStopWithoutGrace(t *testing.T) {
	for name, c := range map[string]struct {
		grace   time.Duration
		status  map[string]int // HTTP status by verb
		want    []string
		isError func(error) bool
	}{
		"running": {
			status: map[string]int{"kill": http.StatusNoContent},
			want:   []string{"kill SIGKILL"},
		},
		"stopped": {
			status: map[string]int{"kill": http.StatusConflict, "stop": http.StatusNotModified},
			want:   []string{"kill SIGKILL", "stop 0"},
		},
		"unknown": {
			status:  map[string]int{"kill": http.StatusNotFound},
			want:    []string{"kill SIGKILL"},
			isError: errdefs.IsNotFound,
		},
		"with grace": {
			grace:  1500 * time.Millisecond,
			status: map[string]int{"stop": http.StatusNoContent},
			want:   []string{"stop 2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var requests []string
			e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.41")
				verb := path.Base(r.URL.Path)
				if status, ok := c.status[verb]; ok {
					query := r.URL.Query()
					requests = append(requests, verb+" "+query.Get("signal")+query.Get("t"))
					w.WriteHeader(status)
				}
			}))

			err := e.Stop(t.Context(), model.ContainerID(idA), c.grace)
			if c.isError == nil && err != nil || c.isError != nil && !c.isError(err) {
				t.Errorf("unexpected error: %v", err)
			}

			if !slices.Equal(requests, c.want) {
				t.Errorf("requests %q, want %q", requests, c.want)
			}
		})
	}
}
