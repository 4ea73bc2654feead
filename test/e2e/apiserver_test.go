package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// object is a Kubernetes object, decoded from JSON.
type object = map[string]any

// apiServer implements the part of the Kubernetes API used by a kubelet: initial pods with their
// secrets, and the status of its node.
type apiServer struct {
	mu sync.Mutex // guards the fields below
	// Objects by collection, such as "/api/v1/namespaces/default/secrets". Objects are replaced,
	// never modified.
	objects map[string][]object
	events  []object
	version int           // of the last write
	written chan struct{} // closed by the next write
}

// kinds maps the collections read by a kubelet to the kinds of their elements.
var kinds = map[string]string{
	"pods": "Pod", "services": "Service", "secrets": "Secret", "nodes": "Node", "configmaps": "ConfigMap",
	"runtimeclasses": "RuntimeClass", "csidrivers": "CSIDriver", "csinodes": "CSINode",
	"leases": "Lease",
}

// serveAPI serves the API inside the node until the test ends, and returns the kubelet's flag for
// it.
func (k *kubelet) serveAPI(t *testing.T, objects map[string][]object) (*apiServer, string) {
	t.Helper()
	a := &apiServer{objects: objects, version: 1, written: make(chan struct{})}
	l := k.engine.Listen(t, "127.0.0.1:0")
	srv := &http.Server{Handler: a}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	file := filepath.Join(k.engine.Dir, "kubeconfig")
	kubeconfig := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: 'http://" + l.Addr().String() +
		"'}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"
	if err := os.WriteFile(file, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}

	return a, "--kubeconfig=" + file
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	kind, isCollection := kinds[path.Base(q.URL.Path)]
	switch {
	case q.Method == http.MethodGet && isCollection && q.FormValue("sendInitialEvents") != "":
		fail(w, http.StatusUnprocessableEntity, "Invalid") // makes the kubelet list and then watch
	case q.Method == http.MethodGet && isCollection && q.FormValue("watch") != "":
		a.watch(w, q)
	case q.Method == http.MethodGet && isCollection:
		version, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(q.URL.Path, "/apis/"), "/api/"),
			"/"+path.Base(q.URL.Path))
		answer(w, object{
			"kind":       kind + "List",
			"apiVersion": version,
			"metadata":   object{"resourceVersion": a.now()},
			"items":      a.list(q.URL.Path, q.FormValue("fieldSelector")),
		})

	case q.Method == http.MethodGet:
		if o := a.find(q.URL.Path); o != nil {
			answer(w, o)
			return
		}
		fail(w, http.StatusNotFound, "NotFound")

	case q.Method == http.MethodPost:
		a.post(w, q)
	case q.Method == http.MethodPatch && path.Dir(q.URL.Path) == "/api/v1/nodes/"+path.Base(path.Dir(q.URL.Path)):
		a.patchNode(w, q)
	default: // usually a status update
		if o := a.find(strings.TrimSuffix(q.URL.Path, "/status")); o != nil {
			answer(w, o)
			return
		}
		fail(w, http.StatusNotFound, "NotFound")
	}
}

func answer(w io.Writer, o object) { _ = json.NewEncoder(w).Encode(o) }

func fail(w http.ResponseWriter, code int, reason string) {
	w.WriteHeader(code)
	answer(w, object{
		"kind":       "Status",
		"apiVersion": "v1",
		"status":     "Failure",
		"reason":     reason,
		"message":    "the test's API server: " + reason,
		"code":       code,
	})
}

// list returns the objects of a collection and its namespaces, filtered by the name in a selector.
func (a *apiServer) list(collection, selector string) []object {
	a.mu.Lock()
	defer a.mu.Unlock()

	name, _ := strings.CutPrefix(selector, "metadata.name=")
	if name == selector {
		name = ""
	}

	out := []object{}
	for c, objects := range a.objects {
		if c != collection && !(path.Base(c) == path.Base(collection) && path.Dir(collection) == "/api/v1") {
			continue
		}

		for _, o := range objects {
			if name == "" || o["metadata"].(object)["name"] == name {
				out = append(out, o)
			}
		}
	}

	return out
}

func (a *apiServer) find(file string) object {
	for _, o := range a.list(path.Dir(file), "metadata.name="+path.Base(file)) {
		return o
	}
	return nil
}

func (a *apiServer) post(w http.ResponseWriter, q *http.Request) {
	var o object
	if err := json.NewDecoder(q.Body).Decode(&o); err != nil {
		fail(w, http.StatusBadRequest, "BadRequest")
		return
	}

	a.mu.Lock()
	exists := false
	for _, other := range a.objects[q.URL.Path] {
		exists = exists || other["metadata"].(object)["name"] == o["metadata"].(object)["name"]
	}

	if path.Base(q.URL.Path) == "events" {
		a.events = append(a.events, o)
	} else if !exists {
		a.stamp(o)
		o["metadata"].(object)["uid"] = fmt.Sprintf("uid-%d", a.version)
		a.objects[q.URL.Path] = append(a.objects[q.URL.Path], o)
	}

	a.mu.Unlock()
	if exists {
		fail(w, http.StatusConflict, "AlreadyExists")
		return
	}

	w.WriteHeader(http.StatusCreated)
	answer(w, o)
}

// stamp assigns the next version to an object before a write. The caller holds mu.
func (a *apiServer) stamp(o object) {
	a.version++
	o["metadata"].(object)["resourceVersion"] = strconv.Itoa(a.version)
	close(a.written)
	a.written = make(chan struct{})
}

// now returns the current version.
func (a *apiServer) now() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return strconv.Itoa(a.version)
}

// watch streams writes to a collection after the client's version.
func (a *apiServer) watch(w http.ResponseWriter, q *http.Request) {
	seen, _ := strconv.Atoi(q.FormValue("resourceVersion"))
	for {
		a.mu.Lock()
		written := a.written
		a.mu.Unlock()
		last := seen
		for _, o := range a.list(q.URL.Path, q.FormValue("fieldSelector")) {
			if v, _ := strconv.Atoi(o["metadata"].(object)["resourceVersion"].(string)); v > seen {
				answer(w, object{"type": "MODIFIED", "object": o})
				last = max(last, v)
			}
		}

		seen = last
		_ = http.NewResponseController(w).Flush()
		select {
		case <-written:
		case <-q.Context().Done():
			return
		}
	}
}

// patchNode updates the kubelet's node.
func (a *apiServer) patchNode(w http.ResponseWriter, q *http.Request) {
	file := strings.TrimSuffix(q.URL.Path, "/status")
	var patch object
	err := json.NewDecoder(q.Body).Decode(&patch)
	a.mu.Lock()
	defer a.mu.Unlock()

	for i, old := range a.objects[path.Dir(file)] {
		if old["metadata"].(object)["name"] != path.Base(file) {
			continue
		}

		var o object
		b, _ := json.Marshal(old)
		if err = errors.Join(err, json.Unmarshal(b, &o)); err != nil {
			fail(w, http.StatusBadRequest, "BadRequest")
			return
		}

		merge(o, patch)
		a.stamp(o)
		a.objects[path.Dir(file)][i] = o
		answer(w, o)

		return
	}

	fail(w, http.StatusNotFound, "NotFound")
}

// merge applies the subset of strategic merge patches used for node status: it merges conditions by
// type and replaces other lists.
func merge(into, patch object) {
	for key, value := range patch {
		old, _ := into[key].(object)
		v, isObject := value.(object)
		list, isList := value.([]any)
		switch {
		case strings.HasPrefix(key, "$"): // the order of a list
		case value == nil:
			delete(into, key)
		case isObject && old != nil:
			merge(old, v)
		case isList && key == "conditions":
			conditions, _ := into[key].([]any)
			for _, c := range list {
				i := slices.IndexFunc(conditions, func(o any) bool { return o.(object)["type"] == c.(object)["type"] })
				if i < 0 {
					conditions = append(conditions, c)
				} else {
					merge(conditions[i].(object), c.(object))
				}
			}
			into[key] = conditions

		case isList:
			into[key] = slices.DeleteFunc(list, func(e any) bool { o, _ := e.(object); return o["$patch"] != nil })
		default:
			into[key] = value
		}
	}
}

// nodeReady returns the condition Ready of the kubelet's node, nil if there is none.
func (a *apiServer) nodeReady() object {
	var node struct{ Status struct{ Conditions []object } }
	b, _ := json.Marshal(a.find("/api/v1/nodes/node"))
	_ = json.Unmarshal(b, &node)
	for _, c := range node.Status.Conditions {
		if c["type"] == "Ready" {
			return c
		}
	}

	return nil
}

// hasEvent reports whether an event of a pod contains a text.
func (a *apiServer) hasEvent(pod, text string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()

	for _, e := range a.events {
		about, _ := e["involvedObject"].(object)
		if about["name"] == pod && strings.Contains(fmt.Sprint(e["message"]), text) {
			return true
		}
	}

	return false
}
